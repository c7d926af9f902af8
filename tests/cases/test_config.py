"""config.json as users bring it: read as transformers reads it, or refused in one line before work.

`tests/test_model_config.py` has every key; here whole commands are given such models.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcompress.checkpoint.manifest import Manifest
from tests import tiny
from tests.cases.making import check_refusal, edit_json
from tests.command import Run

Compress = Callable[..., tuple[int, str, str]]

REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "eps is text": ({"rms_norm_eps": "1e-6"}, ("rms_norm_eps", "'1e-6'", "number")),
    "flag is null": ({"use_cache": None}, ("use_cache", "null")),
    "size is a fraction": ({"hidden_size": 128.0}, ("hidden_size", "128.0", "integer")),
    "layers are null": ({"num_hidden_layers": None}, ("num_hidden_layers", "null")),
    "layers are negative": ({"num_hidden_layers": -1}, ("num_hidden_layers", "-1")),
    "architectures are text": ({"architectures": "LlamaForCausalLM"}, ("architectures",)),
    "another model type": ({"model_type": "qwen2"}, ("model_type 'qwen2'", "'llama'")),
    "another class": ({"architectures": ["MambaForCausalLM"]}, ("unknown architecture MambaForCausalLM",)),
    "su": ({"rope_scaling": {"type": "su", "factor": 2.0}}, ("'su'", "longrope")),
    "linear without factor": ({"rope_scaling": {"rope_type": "linear"}}, ("no factor", "linear")),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ("dynamic", "line 3")),
    "longrope": (
        {
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 16,
                "long_factor": [2.0] * 16,
                "original_max_position_embeddings": 512,
            }
        },
        ("longrope", "line 3"),
    ),
    "partial rotary": ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor 0.5",)),
    "a window that only one engine sees": ({"sliding_window": 128}, ("sliding_window 128", "vLLM")),
    "more layers than tensors": ({"num_hidden_layers": 5}, ("model.layers.4.", "download")),
    "fewer layers than tensors": ({"num_hidden_layers": 3}, ("model.layers.3.", "num_hidden_layers 3")),
    "more KV heads": ({"num_key_value_heads": 4}, ("k_proj.weight", "[64, 128]", "[128, 128]")),
    "KV heads left out": ({"num_key_value_heads": "drop"}, ("k_proj.weight", "[64, 128]")),
    "vocabulary left out": ({"vocab_size": "drop"}, ("embed_tokens.weight", "[300, 128]", "[32000, 128]")),
    "an activation nobody has": ({"hidden_act": "swishy"}, ("swishy", "'silu'")),
    "an activation that one engine has": ({"hidden_act": "gelu"}, ("hidden_act 'gelu'", "'silu'")),
    "a section that is no object": ({"quantization_config": 3}, ("quantization_config",)),
    "a section that is an empty list": ({"quantization_config": []}, ("quantization_config",)),
    "a RoPE type that is a list": ({"rope_scaling": {"rope_type": ["linear"]}}, ("['linear']", "expected one of")),
    "a base that is null": ({"rope_parameters": "drop", "rope_theta": None}, ("rope_theta null", "number")),
    "a context of one token": ({"max_position_embeddings": 1}, ("max_position_embeddings 1", "2")),
    "attention both ways": ({"is_causal": False}, ("is_causal False", "vLLM")),
    "attention both ways, null": ({"is_causal": None}, ("is_causal null", "vLLM")),
    "biases under another name": ({"bias": True}, ("bias True", "vLLM")),
    "no biases under another name": ({"attention_bias": True, "qkv_bias": False}, ("qkv_bias False", "vLLM")),
    "scaled logits": ({"logit_scale": 0.5}, ("logit_scale 0.5", "vLLM")),
}


def change(model: Path, changes: dict[str, Any]) -> None:
    edit_json(model / "config.json", **{key: value for key, value in changes.items() if value != "drop"})
    config = json.loads((model / "config.json").read_text())
    kept = {key: value for key, value in config.items() if changes.get(key) != "drop"}
    (model / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("command", ["plan", "compress"])
def test_refused_before_work(
    name: str, command: str, run: Run, compress: Compress, model: Path, recipe_file: Path
) -> None:
    changes, words = REFUSED[name]
    change(model, changes)
    code, _, stderr = compress() if command == "compress" else run("plan", model, "--recipe", recipe_file)
    check_refusal(code, stderr, *words)
    assert sorted(path.name for path in model.parent.iterdir()) == ["model", "recipe.yaml"]


def test_a_plan_counts_16_bits_for_what_vllm_serves_in_16_bits(run: Run, model: Path, recipe_file: Path) -> None:
    """config.json says float32, and `vllm serve` takes 16 bits all the same."""
    assert json.loads((model / "config.json").read_text())["dtype"] == "float32"
    code, stdout, _ = run("plan", model, "--recipe", recipe_file, "--json")
    assert code == 0
    assert json.loads(stdout)["bytes_per_token"]["base"] == tiny.NUM_LAYERS * 2 * tiny.NUM_KV_HEADS * tiny.HEAD_DIM * 2


@pytest.mark.parametrize("left_out", ["num_key_value_heads", "head_dim", "max_position_embeddings"])
def test_keys_with_a_default_may_be_left_out(left_out: str, run: Run, tmp_path: Path, recipe_file: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", vocab_size=300, num_key_value_heads=4)
    tiny.save_tokenizer(folder)
    change(folder, {left_out: "drop"})
    code, _, stderr = run(
        "compress", folder, "--recipe", recipe_file, "--out", tmp_path / "out", "--samples", 2, "--length", 32
    )
    assert code == 0, stderr
    assert Manifest.load(tmp_path / "out").bytes_per_token.base == 4 * 2 * 4 * 32 * 2


def test_a_window_that_is_the_default_of_the_class(run: Run, tmp_path: Path, recipe_file: Path) -> None:
    """A Mistral without the key has a window of 4,096 tokens in every layer."""
    folder = tiny.save_model(tmp_path / "model", "Mistral", vocab_size=300)
    tiny.save_tokenizer(folder)
    change(folder, {"sliding_window": "drop"})
    code, _, stderr = run("plan", folder, "--recipe", recipe_file)
    check_refusal(code, stderr, "every layer of the model has a sliding window")


@pytest.mark.parametrize(
    ("architecture", "sizes", "fits"),
    [
        ("Llama", {"hidden_size": 136, "num_attention_heads": 6}, False),
        ("Qwen3", {"hidden_size": 136, "num_attention_heads": 6}, True),
    ],
)
def test_hidden_size_that_is_no_multiple_of_the_heads(
    architecture: str, sizes: dict[str, int], fits: bool, run: Run, tmp_path: Path, recipe_file: Path
) -> None:
    """transformers loads a Qwen3 of such sizes, and no Llama."""
    whole = {"hidden_size": 192, "num_attention_heads": 6} if not fits else sizes
    folder = tiny.save_model(tmp_path / "model", architecture, vocab_size=300, num_key_value_heads=2, **whole)
    tiny.save_tokenizer(folder)
    change(folder, sizes)
    code, _, stderr = run(
        "compress", folder, "--recipe", recipe_file, "--out", tmp_path / "out", "--samples", 2, "--length", 32
    )
    if fits:
        assert code == 0, stderr
    else:
        check_refusal(code, stderr, "hidden_size 136", "multiple")


@pytest.mark.parametrize("rope", ["linear", "yarn", "llama3"])
def test_rotations_that_do_not_change(rope: str, compress: Compress, model: Path) -> None:
    extra = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    scaling = {"rope_type": rope, "factor": 2.0, **(extra if rope == "llama3" else {})}
    change(model, {"rope_scaling": scaling, "rope_parameters": "drop", "rope_theta": 10000.0})
    code, _, stderr = compress()
    assert code == 0, stderr


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": 1, "a": 2}', b"{" * 20000])
def test_config_json_that_is_no_object(raw: bytes, compress: Compress, model: Path) -> None:
    (model / "config.json").write_bytes(raw)
    code, _, stderr = compress()
    check_refusal(code, stderr, "config.json")


def test_chunked_attention_is_refused(run: Run, tmp_path: Path, recipe_file: Path) -> None:
    """As published with models for a million tokens; vLLM attends by chunks, transformers does not."""
    folder = tiny.save_model(tmp_path / "model", "Qwen2", vocab_size=300)
    change(folder, {"dual_chunk_attention_config": {"chunk_size": 128, "local_size": 16}})
    code, _, stderr = run("plan", folder, "--recipe", recipe_file)
    check_refusal(code, stderr, "dual_chunk_attention_config", "remove the key")


@pytest.mark.parametrize("same", [{"is_causal": True}, {"bias": None}, {"qkv_bias": False}, {"logit_scale": 1}])
def test_keys_of_vllm_that_change_nothing(same: dict[str, Any], run: Run, model: Path, recipe_file: Path) -> None:
    change(model, same)
    code, _, stderr = run("plan", model, "--recipe", recipe_file)
    assert code == 0, stderr


def test_a_class_of_another_model_is_not_taken_for_a_slip(run: Run, model: Path, recipe_file: Path) -> None:
    change(model, {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"})
    code, _, stderr = run("plan", model, "--recipe", recipe_file, "--strict")
    check_refusal(code, stderr, "unknown architecture MixtralForCausalLM", "supported: ")
    assert "did you mean" not in stderr


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 1, 24), (4, 4, 40), (2, 1, 80), (2, 2, 96), (2, 1, 128), (2, 1, 256)]
)
def test_heads_of_every_shape(
    heads: int, kv_heads: int, head_dim: int, run: Run, tmp_path: Path, recipe_file: Path
) -> None:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "hidden_size": 64}
    folder = tiny.save_model(tmp_path / "model", vocab_size=300, num_hidden_layers=2, **sizes)
    tiny.save_tokenizer(folder)
    code, _, stderr = run(
        "compress", folder, "--recipe", recipe_file, "--out", tmp_path / "out", "--samples", 2, "--length", 32
    )
    assert code == 0, stderr
    assert Manifest.load(tmp_path / "out").bytes_per_token.base == 2 * 2 * kv_heads * head_dim * 2
