from __future__ import annotations

from kvcompress.families.family import COMMON, Family

DEFAULTS = {
    **COMMON,
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
}

FAMILY = Family(
    "LlamaForCausalLM",
    "llama",
    DEFAULTS,
    nullable=frozenset({"num_key_value_heads", "head_dim"}),
    neutral={"is_causal": True, "bias": False, "logit_scale": 1.0},
    windows="by_layer",
    whole_heads=True,
    qkv_bias=None,
    o_bias=None,
)
