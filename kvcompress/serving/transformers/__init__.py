"""Compressed checkpoints in transformers. Importing this package makes transformers read them; then as ever:

from kvcompress.serving.transformers import CompressedCache, prepare

model = AutoModelForCausalLM.from_pretrained(DIR)
cache = CompressedCache.from_pretrained(DIR)
prepare(model, cache)  # needed once per cache where the codec compresses whole blocks of tokens
model.generate(..., past_key_values=cache)

The import has to come before `from_pretrained`: factored and quantized weights are none that transformers knows.
"""

from kvcompress import modeling
from kvcompress.serving.transformers import low_rank
from kvcompress.serving.transformers.cache import CompressedCache, prepare

__all__ = ["CompressedCache", "prepare"]

low_rank.register()
modeling.register()
