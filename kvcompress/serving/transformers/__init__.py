"""Compressed checkpoints in transformers: `register()` for changed weights, `CompressedCache` for the cache.

from kvcompress.serving.transformers import CompressedCache, register

register()
model = AutoModelForCausalLM.from_pretrained(DIR)
cache = CompressedCache.from_pretrained(DIR)
prepare(model, cache)  # needed once per cache where the codec compresses whole blocks of tokens
model.generate(..., past_key_values=cache)
"""

from kvcompress import modeling
from kvcompress.serving.transformers import low_rank
from kvcompress.serving.transformers.blocks import prepare
from kvcompress.serving.transformers.cache import CompressedCache, CompressedLayer

__all__ = ["CompressedCache", "CompressedLayer", "prepare", "register"]


def register() -> None:
    """Make transformers read our checkpoints in this process. May be called any number of times."""
    low_rank.register()
    modeling.register()
