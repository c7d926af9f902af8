"""Compressed checkpoints in transformers: `register()` for changed weights, `CompressedCache` for the cache.

from kvcompress.serving.transformers import CompressedCache, register

register()
model = AutoModelForCausalLM.from_pretrained(DIR)
model.generate(..., past_key_values=CompressedCache.from_pretrained(DIR))
"""

from kvcompress import modeling
from kvcompress.serving.transformers import low_rank
from kvcompress.serving.transformers.cache import CompressedCache, CompressedLayer

__all__ = ["CompressedCache", "CompressedLayer", "register"]


def register() -> None:
    """Make transformers read our checkpoints in this process. May be called any number of times."""
    low_rank.register()
    modeling.register()
