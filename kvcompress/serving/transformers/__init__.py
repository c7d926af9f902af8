"""The codec under generate: `model.generate(..., past_key_values=CompressedCache.from_pretrained(DIR))`.

A codec that compresses whole blocks of tokens also needs `prepare(model, cache)`, once per cache, before.
"""

from kvcompress.serving.transformers.blocks import prepare
from kvcompress.serving.transformers.cache import CompressedCache, CompressedLayer

__all__ = ["CompressedCache", "CompressedLayer", "prepare"]
