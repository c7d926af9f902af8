"""What config.json means: against transformers' own classes, key by key and tensor by tensor."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from kvcompress.checkpoint.completeness import expected_tensors
from kvcompress.families import FAMILIES, Names, supported
from kvcompress.model_config import DecoderConfig, completed, parse

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "sliding_window": None,
}


def named(architecture: str, **changes: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": FAMILIES[architecture].model_type, **changes}


def theirs(config: dict[str, Any]) -> Any:
    return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)


@pytest.mark.parametrize("architecture", supported())
def test_keys_left_out_mean_what_they_mean_to_transformers(architecture: str) -> None:
    left_out = named(architecture)
    ours, stock = parse(left_out), theirs(left_out)
    for key in FAMILIES[architecture].defaults.keys() - {"layer_types"}:
        assert getattr(ours, key) == getattr(stock, key), key
    assert stock.rope_parameters == {"rope_type": ours.rope.kind, "rope_theta": ours.rope.theta}


@pytest.mark.parametrize("architecture", supported())
@pytest.mark.parametrize("left_out", ["num_key_value_heads", "head_dim", "max_position_embeddings", "vocab_size"])
def test_one_key_left_out_of_a_config_with_the_others(architecture: str, left_out: str) -> None:
    config = named(architecture, **{key: value for key, value in SMALL.items() if key != left_out})
    stock = theirs(config)
    # Qwen2's class has no head_dim; its model divides.
    expected = getattr(stock, left_out, SMALL["hidden_size"] // SMALL["num_attention_heads"])
    if left_out == "num_key_value_heads" and SMALL["num_attention_heads"] % expected:
        with pytest.raises(ValueError, match=f"4 query heads and {expected} KV heads"):
            parse(config)
    else:
        assert getattr(parse(config), left_out) == expected


@pytest.mark.parametrize("architecture", supported())
def test_expected_tensors_are_those_of_the_class(architecture: str) -> None:
    for tied, attention, mlp in itertools.product((False, True), repeat=3):
        biased = {} if architecture.startswith("Mistral") else {"attention_bias": attention, "mlp_bias": mlp}
        config = named(architecture, **SMALL, tie_word_embeddings=tied, **biased)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(theirs(config))
        stock = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if tied:
            del stock[f"{Names().head}.weight"]
        assert dict(expected_tensors(parse(config))) == stock


@pytest.mark.parametrize("use", [False, True])
@pytest.mark.parametrize("kinds", [None, ["sliding_attention", "full_attention"] * 2])
def test_windows_of_qwen_are_those_of_its_layers(use: bool, kinds: list[str] | None) -> None:
    window = {"sliding_window": 64, "max_window_layers": 1, "use_sliding_window": use}
    config = named("Qwen3ForCausalLM", **SMALL | window | ({"layer_types": kinds} if kinds else {}))
    if kinds and not use:
        with pytest.raises(ValueError, match="use_sliding_window is not true"):
            parse(config)
        return
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(theirs(config))
    assert parse(config).windows == tuple(layer.self_attn.sliding_window for layer in model.model.layers)


def test_layers_of_a_llama_that_vllm_windows() -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    config = named("LlamaForCausalLM", **SMALL | {"layer_types": kinds})
    assert parse(config).windows == (None,) * 4
    assert parse(config | {"sliding_window": 64}).windows == (None, 64, None, 64)


def test_context_is_what_the_model_was_stretched_to() -> None:
    def context(**rope: Any) -> int:
        return parse(named("LlamaForCausalLM", **SMALL, rope_scaling=rope)).context

    assert context(rope_type="linear", factor=4.0) == 2048
    assert context(type="dynamic", factor=2) == 1024
    assert context(rope_type="yarn", factor=4.0) == 512
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    assert context(rope_type="llama3", factor=4.0, **llama3) == 512


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers null; expected .*integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0; expected .*1"),
        ({"num_hidden_layers": True}, "num_hidden_layers True"),
        ({"hidden_size": 64.0}, "hidden_size 64.0; expected .*integer"),
        ({"hidden_size": "64"}, "hidden_size '64'"),
        ({"num_attention_heads": [4]}, r"num_attention_heads \[4\]"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps '1e-6'; expected number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan"),
        ({"use_cache": None}, "use_cache null"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false'"),
        ({"eos_token_id": "</s>"}, "eos_token_id '</s>'"),
        ({"architectures": "LlamaForCausalLM"}, "architectures 'LlamaForCausalLM'; expected a list"),
        ({"model_type": "mistral"}, "model_type 'mistral' and architecture LlamaForCausalLM"),
        ({"model_type": None}, "model_type None"),
        ({"head_dim": None, "hidden_size": None}, "hidden_size null"),
        ({"hidden_size": 72, "num_attention_heads": 5, "num_key_value_heads": 5}, "multiple of the heads"),
        ({"dtype": "int3"}, "dtype 'int3'"),
        ({"torch_dtype": 16}, "dtype 16"),
        ({"sliding_window": 128}, "sliding_window 128, which transformers does not apply .* vLLM does"),
        ({"layer_types": ["full_attention"] * 3}, "3 layer_types and 4 layers"),
        ({"layer_types": ["linear"] * 4}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "type 'su'.* old name of longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "no factor of its linear RoPE"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "'2' as factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor 0.5"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "no low_freq_factor of its llama3"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 1.0,
                    "original_max_position_embeddings": 256,
                }
            },
            "low_freq_factor 4.0 and high_freq_factor 1.0",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling 'linear'; expected an object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "RoPE of its own for full_attention"),
        ({"rope_theta": "10000"}, "rope_theta '10000'"),
        ({"rope_theta": -1.0}, "rope_theta -1.0"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parse(named("LlamaForCausalLM", **SMALL) | changes)
    assert "\n" not in str(caught.value)


def test_mistral() -> None:
    whole = named("MistralForCausalLM", **{key: value for key, value in SMALL.items() if key != "sliding_window"})
    assert parse(whole).windows == (4096,) * 4
    assert parse(whole | {"sliding_window": None}).windows == (None,) * 4
    with pytest.raises(ValueError, match="sliding_attention in layer_types"):
        parse(whole | {"layer_types": ["sliding_attention"] * 4})
    with pytest.raises(ValueError, match="sliding_window 0"):
        parse(whole | {"sliding_window": 0})
    with pytest.raises(ValueError, match="attention_bias True, which transformers does not read"):
        parse(whole | {"attention_bias": True})


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_a_null_that_the_class_cannot_read(architecture: str) -> None:
    with pytest.raises(ValueError, match="head_dim null"):
        parse(named(architecture, **SMALL | {"head_dim": None}))


def test_older_spellings() -> None:
    older = named("LlamaForCausalLM", **SMALL, torch_dtype="torch.float16", rope_theta=5e5, rope_scaling=None)
    found = parse(older)
    assert isinstance(found, DecoderConfig)
    assert (found.dtype, found.rope.theta, found.rope.kind) == ("float16", 5e5, "default")
    assert completed(older)["mlp_bias"] is False


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 3e4}, "rope_theta": 5e5},
        {"rope_scaling": {}, "rope_theta": 5e5},
    ],
)
def test_rope_is_read_as_transformers_reads_it(rope: dict[str, Any]) -> None:
    config = named("LlamaForCausalLM", **SMALL, **rope)
    found, stock = parse(config).rope, theirs(config).rope_parameters
    assert (found.kind, found.theta, found.factor) == (
        stock["rope_type"],
        stock["rope_theta"],
        stock.get("factor", 1.0),
    )
