from __future__ import annotations

from kvcompress.families.family import Family
from kvcompress.families.qwen2 import DEFAULTS

FAMILY = Family(
    "Qwen3ForCausalLM",
    "qwen3",
    {**DEFAULTS, "head_dim": 128, "attention_bias": False},
    nullable=frozenset({"num_key_value_heads"}),
    neutral={"is_causal": True, "dual_chunk_attention_config": None},
    windows="opt_in",
    qkv_bias=None,
    o_bias=None,
    qk_norm="head",
)
