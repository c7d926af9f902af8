"""Compressed checkpoints in transformers: `register()` for factored weights, `CompressedCache` for the cache.

from kvcompress.serving.transformers import CompressedCache, register

register()
model = AutoModelForCausalLM.from_pretrained(DIR)
model.generate(..., past_key_values=CompressedCache.from_pretrained(DIR))
"""

from kvcompress.serving.transformers.cache import CompressedCache, CompressedLayer
from kvcompress.serving.transformers.low_rank import register

__all__ = ["CompressedCache", "CompressedLayer", "register"]
