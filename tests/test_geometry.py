from __future__ import annotations

from typing import Any

import pytest

from kvcompress.families import FAMILIES, supported
from kvcompress.geometry import ModelGeometry

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
    "model_type": "llama",
}


def geometry(**changes: Any) -> ModelGeometry:
    changes = {"model_type": FAMILIES[changes["architectures"][0]].model_type} | changes if _known(changes) else changes
    return ModelGeometry.from_config(CONFIG | changes)


def _known(changes: dict[str, Any]) -> bool:
    return (changes.get("architectures") or [None])[0] in FAMILIES


@pytest.mark.parametrize("architecture", supported())
def test_supported_architectures(architecture: str) -> None:
    found = geometry(architectures=[architecture], sliding_window=None)
    assert (found.num_layers, found.group_size, found.head_dim) == (4, 2, 64)
    assert found.kv_bytes_per_token() == 4 * 2 * 2 * 64 * 2


def test_sliding_windows() -> None:
    assert geometry(architectures=["MistralForCausalLM"], sliding_window=512).sliding_window == (512,) * 4
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 512, "max_window_layers": 3}
    assert geometry(**qwen, use_sliding_window=False).sliding_window == (None,) * 4
    assert geometry(**qwen, use_sliding_window=True).sliding_window == (None, None, None, 512)
    kinds = ["full_attention", "sliding_attention"] * 2
    assert geometry(**qwen, use_sliding_window=True, layer_types=kinds).sliding_window == (None, 512, None, 512)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LamaForCausalLM"]}, "unknown architecture LamaForCausalLM.*did you mean LlamaForCausalLM"),
        ({"architectures": None}, "unknown architecture"),
        ({"kv_lora_rank": 512}, "multi-head latent attention"),
        ({"num_key_value_heads": 3}, "multiple of KV heads"),
        ({"head_dim": 36}, "multiple of 8"),
    ],
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        geometry(**changes)


def test_latent_attention_of_ours() -> None:
    ours = {"architectures": ["KVCompressMLAForCausalLM"], "kv_lora_rank": 96, "qk_rope_head_dim": 32}
    assert geometry(**ours).kv_bytes_per_token() == 4 * (96 + 32) * 2
    per_layer = geometry(**ours | {"kv_lora_rank": [96, 64, 64, 32]})
    assert per_layer.latent_dims == (128, 96, 96, 64)
    assert per_layer.layer_kv_bytes_per_token(3, element_bytes=4) == 64 * 4
    with pytest.raises(ValueError, match="3 latent ranks for 4 layers"):
        geometry(**ours | {"kv_lora_rank": [96, 64, 64]})
    with pytest.raises(ValueError, match="no 'qk_rope_head_dim'"):
        geometry(architectures=["KVCompressMLAForCausalLM"], kv_lora_rank=96)
