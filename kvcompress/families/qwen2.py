from __future__ import annotations

from kvcompress.families.family import COMMON, Family

DEFAULTS = {
    **COMMON,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

FAMILY = Family(
    "Qwen2ForCausalLM",
    "qwen2",
    DEFAULTS,
    nullable=frozenset({"num_key_value_heads"}),
    neutral={"is_causal": True, "qk_norm": False, "dual_chunk_attention_config": None},
    windows="opt_in",
    qkv_bias=True,
)
