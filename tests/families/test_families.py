"""A model family is one data file: families that the product does not have, as data alone, and what is not data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kvcompress import families
from kvcompress.checkpoint.completeness import check_complete, expected_tensors
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.families.family import COMMON, Experts, Family, Names
from kvcompress.methods import registry
from kvcompress.model_config import parse
from kvcompress.pipeline import compress as compressing
from kvcompress.pipeline import plan as planning
from kvcompress.recipe import parse as parse_recipe
from kvcompress.serving.transformers import CompressedCache
from tests import tiny

SIZES = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
NEEDED = {"vocab_size": 1, "intermediate_size": 1, "num_key_value_heads": None, "head_dim": None}
DEFAULTS = {**COMMON, **NEEDED, "max_position_embeddings": 2048, "attention_bias": False}
NULLABLE = frozenset({"num_key_value_heads", "head_dim"})

EXPERTS = Experts(
    ("num_experts", "num_local_experts"), "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers"
)
ADDED: dict[str, tuple[Family, dict[str, Any]]] = {
    # Factors on embeddings, layers' outputs and logits, and attention's own.
    "Granite": (
        Family(
            "GraniteForCausalLM",
            "granite",
            DEFAULTS | {"mlp_bias": False},
            NULLABLE,
            qkv_bias=None,
            o_bias=None,
            embedding_scale="embedding_multiplier",
            logits_divisor="logits_scaling",
        ),
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    # Norms after attention and MLP in place of those before them; queries and keys normalised over all heads.
    "Olmo2": (
        Family(
            "Olmo2ForCausalLM",
            "olmo2",
            DEFAULTS,
            NULLABLE,
            qkv_bias=None,
            o_bias=None,
            qk_norm="all",
            names=Names(norms=("post_attention_layernorm", "post_feedforward_layernorm")),
        ),
        {},
    ),
    # Three layers with experts, one without.
    "Qwen3Moe": (
        Family(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            DEFAULTS,
            NULLABLE,
            qkv_bias=None,
            o_bias=None,
            qk_norm="head",
            windows="opt_in",
            experts=EXPERTS,
        ),
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "mlp_only_layers": [1],
        },
    ),
}
LOSSLESS = "version: 1\nstages:\n  - {method: pca, metric: none}\n  - {method: scalar, bits: 16}\n"


def save(directory: Path, name: str, **config: Any) -> Path:
    """A random model of an architecture with a tokenizer."""
    torch.manual_seed(7)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES | config))
    model.save_pretrained(directory)
    tiny.save_tokenizer(directory)
    return directory


def compress(model: Path, out: Path, text: str = LOSSLESS, **options: Any) -> planning.Plan:
    recipe = parse_recipe(text, registry.schemas())
    chosen = compressing.Options(samples=4, length=64, **options)
    return compressing.compress(str(model), recipe, out, chosen, lambda *_: None)


def assert_close_to_base(model: Path, out: Path) -> None:
    tokens = torch.tensor(tiny.prompts([120]))
    with torch.no_grad():
        base = tiny.load_model(model)(tokens).logits
        found = tiny.load_model(out)(tokens, past_key_values=CompressedCache.from_pretrained(out)).logits
    assert (base - found).abs().max() < 5e-3 * base.abs().max()


@pytest.mark.parametrize("name", ADDED)
def test_a_family_is_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    family, config = ADDED[name]
    monkeypatch.setitem(families.FAMILIES, family.architecture, family)
    model = save(tmp_path / "model", name, **config)
    checkpoint = Checkpoint.open(model)
    assert {key: info.shape for key, info in checkpoint.tensors.items()} == dict(
        expected_tensors(parse(checkpoint.config))
    )
    compress(model, tmp_path / "out", strict=True)
    assert_close_to_base(model, tmp_path / "out")


@pytest.mark.parametrize("name", ADDED)
def test_layers_one_by_one_are_the_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the loss and its gradient: every factor is where the model has it."""
    from kvcompress.calibration.capture import LayerRunner
    from kvcompress.calibration.corpus import Calibration
    from kvcompress.calibration.linears import LossHead

    family, config = ADDED[name]
    monkeypatch.setitem(families.FAMILIES, family.architecture, family)
    model = tiny.load_model(save(tmp_path / "model", name, **config))
    tokens_T = torch.tensor(tiny.prompts([40]))[0]
    runner = LayerRunner(Checkpoint.open(tmp_path / "model"), "cpu", torch.float32)
    sample = Calibration("x", tokens_T[None].numpy(), torch.zeros(1, dtype=torch.int64).numpy())
    hidden_TC = runner.embed(sample)[0]
    for index in range(SIZES["num_hidden_layers"]):
        with runner.layer(index) as layer:
            hidden_TC = runner.forward(layer, hidden_TC, 0, None)
    expected = model(tokens_T[None], output_hidden_states=True)
    loss = torch.nn.functional.cross_entropy(expected.logits[0, :-1], tokens_T[1:], reduction="sum")
    found, _ = LossHead(runner).gradient(hidden_TC, tokens_T)
    assert found == pytest.approx(float(loss.detach()), rel=1e-4)


def test_an_ordinary_family_is_tried_with_one_warning(tmp_path: Path) -> None:
    model = save(tmp_path / "model", "Olmo2")
    with pytest.warns(UserWarning, match="Olmo2ForCausalLM is not known") as warned:
        compress(model, tmp_path / "out")
    assert len([one for one in warned if "is not known" in str(one.message)]) == 1
    assert_close_to_base(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"unknown architecture Olmo2ForCausalLM .*supported: LlamaForCausalLM"):
        compress(model, tmp_path / "strict", strict=True)


def test_what_is_not_ordinary_is_refused_before_work(tmp_path: Path) -> None:
    """Stacked experts are not where an ordinary decoder has its MLP."""
    _, config = ADDED["Qwen3Moe"]
    model = save(tmp_path / "model", "Qwen3Moe", **config)
    with (
        pytest.warns(UserWarning, match="Qwen3MoeForCausalLM is not known"),
        pytest.raises(ValueError, match=r"Qwen3MoeForCausalLM.*not ordinary: model.layers.0.mlp.experts.gate_up_proj"),
    ):
        compress(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_family_that_is_tried_must_say_its_sizes(tmp_path: Path) -> None:
    model = save(tmp_path / "model", "Olmo2")
    config = json.loads((model / "config.json").read_text())
    del config["num_attention_heads"]
    with pytest.raises(ValueError, match=r"cannot be tried, because .* has no num_attention_heads"):
        parse(config)


def test_attention_of_a_family_that_is_tried_is_complete(tmp_path: Path) -> None:
    model = save(tmp_path / "model", "Olmo2")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.self_attn.v_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(model)
    with pytest.raises(ValueError, match=r"has no tensor model.layers.2.self_attn.v_proj.weight"):
        check_complete(checkpoint, parse(checkpoint.config))


def test_windows_of_a_family_that_is_tried() -> None:
    config = {"architectures": ["OtherForCausalLM"], "model_type": "other", **SIZES}
    assert parse(config).windows == (None,) * 4
    assert parse(config | {"sliding_window": 64}).windows == (64,) * 4
    kinds = ["full_attention", "sliding_attention"] * 2
    assert parse(config | {"sliding_window": 64, "layer_types": kinds}).windows == (None, 64, None, 64)
    with pytest.raises(ValueError, match="layer_types"):
        parse(config | {"layer_types": ["linear_attention"] * 4})


def test_data_of_a_nested_config() -> None:
    inner = Family("InnerForCausalLM", "inner", DEFAULTS, NULLABLE, text_config="text_config", windows="in_all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, inner.architecture, inner)
        config = parse({"architectures": ["InnerForCausalLM"], "model_type": "inner", "text_config": SIZES})
        assert (config.num_hidden_layers, config.head_dim, config.vocab_size) == (4, 32, 300)
