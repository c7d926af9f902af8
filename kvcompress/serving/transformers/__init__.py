"""The codec under generate: `model.generate(..., past_key_values=CompressedCache.from_pretrained(DIR))`."""

from kvcompress.serving.transformers.cache import CompressedCache, CompressedLayer

__all__ = ["CompressedCache", "CompressedLayer"]
