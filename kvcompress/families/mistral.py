from __future__ import annotations

from kvcompress.families.family import COMMON, Family

FAMILY = Family(
    "MistralForCausalLM",
    "mistral",
    {
        **COMMON,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    nullable=frozenset({"head_dim"}),
    unread=frozenset({"attention_bias", "mlp_bias"}),
    neutral={"is_causal": True, "bias": False, "logit_scale": 1.0, "llama_4_scaling": None},
    windows="in_all",
)
