from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvcompress import model_config
from kvcompress.checkpoint.manifest import Manifest
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.verify import verify
from kvcompress.pipeline import compress as compressing
from kvcompress.pipeline import plan as planning
from kvcompress.pipeline.decompress import decompress
from kvcompress.serving.transformers import CompressedCache
from tests import tiny
from tests.compression import OPTIONS, compress, recipe, tree_sha256


@pytest.fixture(scope="module")
def compressed(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "out"
    compress(base_model, out)
    return out


def test_output_is_complete_and_verifies(compressed: Path, base_model: Path) -> None:
    assert verify(compressed).ok
    manifest = Manifest.load(compressed)
    assert manifest.bytes_per_token.ratio == pytest.approx(4 * 2 * 2 * 32 * 2 / (4 * 2 * (18 + 10)), rel=1e-4)
    assert [stage["method"] for stage in manifest.stages] == ["pca", "scalar"]
    assert all(0 < layer["relative_error"] < 1 for layer in manifest.layers)
    assert (compressed / "model.safetensors").read_bytes() == (base_model / "model.safetensors").read_bytes()
    assert {"tokenizer.json", "README.md", "generation_config.json"} <= {path.name for path in compressed.iterdir()}
    assert not compressed.with_name("out.partial").exists()


def test_loads_in_plain_transformers(compressed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    assert model.config.num_hidden_layers == tiny.NUM_LAYERS


def test_plan_predicts_what_compress_writes(compressed: Path, base_model: Path) -> None:
    made = planning.make(Checkpoint.open(base_model), recipe(), str(base_model)).to_json()
    manifest = Manifest.load(compressed)
    assert made["bytes_per_token"]["compressed"] == manifest.bytes_per_token.compressed
    for planned, found in zip(made["layers"], manifest.layers, strict=True):
        for key in ("rank", "bands", "bits"):
            assert planned["k"][key] == found["k"][key]
        assert planned["bytes_per_token"] == found["bytes_per_token"]


def test_a_plan_parses_config_json_once(base_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[object] = []
    completed = model_config.completed

    def counted(config: dict[str, Any]) -> dict[str, Any]:
        parsed.append(config)
        return completed(config)

    monkeypatch.setattr(model_config, "completed", counted)
    planning.make(Checkpoint.open(base_model), recipe(), str(base_model))
    assert len(parsed) == 1


def test_cache_really_holds_the_stated_bytes(compressed: Path) -> None:
    model, cache = tiny.load_model(compressed), CompressedCache.from_pretrained(compressed)
    with torch.no_grad():
        model(torch.tensor(tiny.prompts([50])), past_key_values=cache)
    assert cache.nbytes == 50 * Manifest.load(compressed).bytes_per_token.compressed


def test_lossless_recipe_reproduces_the_base_model(base_model: Path, tmp_path: Path) -> None:
    compress(base_model, tmp_path / "out", "  - method: pca\n    metric: none\n  - method: scalar\n    bits: 16\n")
    model = tiny.load_model(base_model)
    tokens = torch.tensor(tiny.prompts([200]))
    with torch.no_grad():
        base = model(tokens).logits
        ours = model(tokens, past_key_values=CompressedCache.from_pretrained(tmp_path / "out")).logits
    assert (base - ours).abs().max() < 5e-3 * base.abs().max()


@pytest.mark.parametrize("metric", ["none", "attention"])
def test_thirty_two_bits_at_full_rank_are_the_base_model(metric: str, base_model: Path, tmp_path: Path) -> None:
    compress(base_model, tmp_path / "out", f"  - method: pca\n    metric: {metric}\n  - method: scalar\n    bits: 32\n")
    model = tiny.load_model(base_model)
    tokens = torch.tensor(tiny.prompts([200]))
    with torch.no_grad():
        base = model(tokens).logits
        ours = model(tokens, past_key_values=CompressedCache.from_pretrained(tmp_path / "out")).logits
    assert (base - ours).abs().max() <= 1e-3


@pytest.mark.parametrize(
    "parameters", ["target_bits_per_channel: 3.3", "target_bits_per_channel: 2.5\n    outliers: {k: 2, v: 1}"]
)
def test_one_budget_for_the_model_is_planned_exactly(parameters: str, base_model: Path, tmp_path: Path) -> None:
    text = f"  - method: pca\n  - method: scalar\n    {parameters}\n"
    compress(base_model, tmp_path / "out", text)
    manifest = Manifest.load(tmp_path / "out")
    planned = planning.make(Checkpoint.open(base_model), recipe(text), str(base_model)).bytes_per_token
    assert manifest.bytes_per_token.compressed == planned
    assert sum(layer["bytes_per_token"] for layer in manifest.layers) == planned
    sizes = {(layer["k"]["bits"], layer["v"]["bits"]) for layer in manifest.layers}
    assert len(sizes) > 1, "layers of this model differ, so their shares should"
    model, cache = tiny.load_model(tmp_path / "out"), CompressedCache.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model(torch.tensor(tiny.prompts([50])), past_key_values=cache)
    assert cache.nbytes == 50 * planned


def test_manifest_says_how_many_tokens_clip(compressed: Path, base_model: Path, tmp_path: Path) -> None:
    compress(base_model, tmp_path / "out", "  - method: pca\n  - method: scalar\n    bits: 16\n")
    for layer in Manifest.load(tmp_path / "out").layers:
        assert (layer["k"]["clipped"], layer["v"]["clipped"]) == (0, 0)
    shares = [layer[side]["clipped"] for layer in Manifest.load(compressed).layers for side in ("k", "v")]
    assert all(0 <= share <= 1 for share in shares)
    assert any(shares), "two bits clip now and then"


def test_more_bits_less_error(base_model: Path, tmp_path: Path) -> None:
    errors = []
    for bits in (2, 4, 8, 16):
        compress(base_model, tmp_path / str(bits), f"  - method: pca\n  - method: scalar\n    bits: {bits}\n")
        errors.append([layer["relative_error"] for layer in Manifest.load(tmp_path / str(bits)).layers])
    for more, fewer in zip(errors[1:], errors, strict=False):
        assert all(low < high for low, high in zip(more, fewer, strict=True))


def test_same_inputs_same_bytes(compressed: Path, base_model: Path, tmp_path: Path) -> None:
    compress(base_model, tmp_path / "again")
    assert tree_sha256(tmp_path / "again") == tree_sha256(compressed)
    compress(base_model, tmp_path / "other", seed=1)
    assert tree_sha256(tmp_path / "other") != tree_sha256(compressed)


@pytest.mark.parametrize("interrupted_at", [("capturing layers", 2), ("writing weights", 1)])
def test_resume_after_interruption(
    interrupted_at: tuple[str, int], compressed: Path, base_model: Path, tmp_path: Path
) -> None:
    def interrupt(step: str, done: int, total: int) -> None:
        if step == interrupted_at[0] and done >= interrupted_at[1]:
            raise KeyboardInterrupt

    out, options = tmp_path / "out", compressing.Options(**OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        compressing.compress(str(base_model), recipe(), out, options, interrupt)
    assert not out.exists()
    with pytest.raises(ValueError, match="--resume"):
        compress(base_model, out)
    with pytest.raises(ValueError, match="seed"):
        compress(base_model, out, resume=True, seed=3)


def test_resumed_output_is_identical(compressed: Path, base_model: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", compressing.Options(**OPTIONS, resume=True)
    for stop in range(1, tiny.NUM_LAYERS):

        def interrupt(step: str, done: int, total: int, stop: int = stop) -> None:
            if step == "capturing layers" and done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compressing.compress(str(base_model), recipe(), out, options, interrupt)
    compress(base_model, out, resume=True)
    assert tree_sha256(out) == tree_sha256(compressed)
    compress(base_model, out, resume=True)  # nothing left to do is no error


def test_lost_scratch_state_is_recomputed(compressed: Path, base_model: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", compressing.Options(**OPTIONS, resume=True)

    def interrupt(step: str, done: int, total: int) -> None:
        if step == "capturing layers" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compressing.compress(str(base_model), recipe(), out, options, interrupt)
    for path in (tmp_path / "out.partial").rglob("*hidden*"):
        path.write_bytes(path.read_bytes()[:-4])
    compress(base_model, out, resume=True)
    assert tree_sha256(out) == tree_sha256(compressed)


def test_sliding_window_layers_stay_uncompressed_and_are_reported(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    base = tiny.save_model(
        tmp_path / "base", "Qwen2", use_sliding_window=True, sliding_window=16, layer_types=kinds, vocab_size=300
    )
    tiny.save_tokenizer(base)
    compress(base, tmp_path / "out")
    layers = Manifest.load(tmp_path / "out").layers
    assert [layer["k"] is None for layer in layers] == [False, True, False, False]
    assert layers[1]["reason"] == "sliding window of 16"


def test_decompress_gives_the_base_weights_back(compressed: Path, base_model: Path, tmp_path: Path) -> None:
    decompress(compressed, tmp_path / "plain", lambda *_: None)
    plain = tmp_path / "plain"
    assert (plain / "model.safetensors").read_bytes() == (base_model / "model.safetensors").read_bytes()
    assert json.loads((plain / "config.json").read_text()) == json.loads((base_model / "config.json").read_text())
    assert not (plain / "kvcompress").exists()
    with pytest.raises(ValueError, match="not compressed by kvcompress"):
        decompress(plain, tmp_path / "again", lambda *_: None)


def test_decompress_refuses_a_damaged_checkpoint(base_model: Path, tmp_path: Path) -> None:
    compress(base_model, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors::"):
        decompress(tmp_path / "out", tmp_path / "plain", lambda *_: None)
    assert not (tmp_path / "plain").exists()
