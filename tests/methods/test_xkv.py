from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvcompress.calibration import corpus, tokenizer
from kvcompress.checkpoint.manifest import Manifest
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.verify import verify
from kvcompress.geometry import ModelGeometry
from kvcompress.methods.xkv import Xkv, XkvConfig
from kvcompress.pipeline import compress as compressing
from kvcompress.pipeline import plan as planning
from kvcompress.pipeline.decompress import decompress
from tests.calibration import xkv_probe
from tests.compression import OPTIONS, compress, listed, recipe, tree_sha256

GEOMETRY = ModelGeometry("LlamaForCausalLM", 6, 128, 4, 2, 64, 1024, 1000, (None,) * 6)


@pytest.fixture(scope="module")
def calibration_states(base_model: Path) -> xkv_probe.States:
    """What `compress` calibrates on, by transformers' own forward pass."""
    text = corpus.Corpus("builtin", tokenizer.load(base_model), 300, lambda *_: None)
    built = text.sample(6, 96, 1024, 0)
    assert built.offsets_N.any()
    return xkv_probe.states(base_model, torch.from_numpy(built.tokens_NT), built.offsets_N.tolist())


@pytest.mark.parametrize("center", [True, False])
def test_error_is_that_of_the_truncated_svd_of_the_layers_side_by_side(
    center: bool, base_model: Path, calibration_states: xkv_probe.States, tmp_path: Path
) -> None:
    fields = f"group: 3, rank: {{k: 0.25, v: 0.5}}, metric: none, center: {str(center).lower()}"
    codecs = xkv_probe.compress(base_model, tmp_path / "out", fields, **OPTIONS)
    assert [codec.spec.group for codec in codecs] == [(0, 1, 2)] * 3 + [(3,)]
    for group in ((0, 1, 2), (3,)):
        for side, per_layer in (("k", 16), ("v", 32)):
            states = [calibration_states[side][index].double().flatten(1) for index in group]
            joined = torch.cat([x - x.mean(0) * center for x in states], dim=1)
            _, singular, _ = torch.linalg.svd(joined, full_matrices=False)
            best = float((singular[per_layer * len(group) :].square().sum() / singular.square().sum()).sqrt())
            assert 0.05 < best < 0.9
            error = xkv_probe.basis_error(codecs, group, side, calibration_states)
            assert error == pytest.approx(best, rel=1e-4)


def test_attention_metric_lowers_the_error_of_the_layers_output(base_model: Path, tmp_path: Path) -> None:
    errors = {}
    for metric in ("none", "attention"):
        compress(
            base_model, tmp_path / metric, listed(f"method: xkv, group: 2, rank: 0.5, metric: {metric}"), samples=8
        )
        errors[metric] = sum(layer["v"]["relative_error"] for layer in Manifest.load(tmp_path / metric).layers)
    assert errors["attention"] < errors["none"]


@pytest.mark.parametrize(
    "stages",
    [
        ("method: xkv, group: 3, rank: {k: 0.5, v: 0.75}", "method: scalar, bits: {k: 8, v: 4}"),
        ("method: xkv, share: v, group: 2, rank: {k: 0.75, v: 16}", "method: scalar, bits: 4"),
        ("method: xkv, group: 4, rank: 0.75", "method: scalar, target_bits_per_channel: {k: 3.25, v: 2.25}"),
        ("method: xkv, basis: prompt, group: 2, rank: {k: 0.5, v: 0.25}",),
        ("method: xkv, basis: prompt, share: v, group: 4, rank: {k: 0.5, v: 0.25}, sink: 2",),
    ],
)
def test_plan_is_what_compress_writes_and_decompress_takes_back(
    stages: tuple[str, ...], base_model: Path, tmp_path: Path
) -> None:
    made = planning.make(Checkpoint.open(base_model), recipe(listed(*stages)), str(base_model)).to_json()
    compress(base_model, tmp_path / "out", listed(*stages))
    manifest = Manifest.load(tmp_path / "out")
    assert verify(tmp_path / "out").ok
    assert made["bytes_per_token"]["compressed"] == manifest.bytes_per_token.compressed
    for planned, found in zip(made["layers"], manifest.layers, strict=True):
        assert planned["bytes_per_token"] == found["bytes_per_token"]
        assert planned["v"]["group"] == found["v"]["group"]
        assert 0 < found["relative_error"] < 1
    decompress(tmp_path / "out", tmp_path / "plain", lambda *_: None)
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (base_model / "model.safetensors").read_bytes()
    assert "quantization_config" not in (tmp_path / "plain/config.json").read_text()
    compress(base_model, tmp_path / "again", listed(*stages))
    assert tree_sha256(tmp_path / "again") == tree_sha256(tmp_path / "out")


def test_automatic_groups_save_bytes_and_a_plan_says_the_most(base_model: Path, tmp_path: Path) -> None:
    stages = ("method: xkv, group: auto, max_error: 0.8, rank: 0.5", "method: scalar, bits: 8")
    most = planning.make(Checkpoint.open(base_model), recipe(listed(*stages)), str(base_model)).bytes_per_token
    found = compress(base_model, tmp_path / "out", listed(*stages))
    manifest = Manifest.load(tmp_path / "out")
    assert found.bytes_per_token == manifest.bytes_per_token.compressed < most
    with pytest.raises(ValueError, match=r"recipe line 3: xkv: keys of layer 0 .* above max_error 0.01"):
        compress(base_model, tmp_path / "strict", listed("method: xkv, group: auto, max_error: 0.01, rank: 0.25"))


def test_prompt_form_counts_factors_per_request(base_model: Path) -> None:
    stages = recipe(listed("method: xkv, basis: prompt, group: 4, rank: {k: 0.5, v: 0.25}"))
    short, long = (
        planning.make(Checkpoint.open(base_model), stages, str(base_model), context=context).to_json()["context"]
        for context in (1000, 2000)
    )
    # Four layers of 2 x 32 channels in 16 bits; factors of the group: tokens x 4 r in common, 4 r x 64 per layer.
    assert short["compressed_bytes"] == 2 * (1000 * 4 * (32 + 16) + 4 * 4 * (32 + 16) * 64)
    assert long["compressed_bytes"] - short["compressed_bytes"] == 1000 * 2 * 4 * (32 + 16)


def test_interrupted_and_resumed_gives_the_same_bytes(base_model: Path, tmp_path: Path) -> None:
    stages = recipe(listed("method: xkv, group: 2, rank: 0.5"))
    for stop in (("capturing layers", 2), ("fitting layers", 2)):

        def interrupt(step: str, done: int, total: int, stop: tuple[str, int] = stop) -> None:
            if (step, done) == stop:
                raise KeyboardInterrupt

        options = compressing.Options(**OPTIONS, resume=stop[0] != "capturing layers")
        with pytest.raises(KeyboardInterrupt):
            compressing.compress(str(base_model), stages, tmp_path / "out", options, interrupt)
    compress(base_model, tmp_path / "out", listed("method: xkv, group: 2, rank: 0.5"), resume=True)
    compress(base_model, tmp_path / "straight", listed("method: xkv, group: 2, rank: 0.5"))
    assert tree_sha256(tmp_path / "out") == tree_sha256(tmp_path / "straight")


def test_ranks_are_per_layer_and_stripes_whole_channel_groups() -> None:
    config = XkvConfig.model_validate({"rank": {"k": 0.5, "v": 24}, "group": 4})
    profiles = Xkv().profiles(config, GEOMETRY, [0, 1, 2, 4, 5])
    assert [(profile.k_rank, profile.v_rank) for profile in profiles] == [(64, 24)] * 5
    assert [profile.member.group for profile in profiles] == [(0, 1, 2, 4)] * 4 + [(5,)]  # type: ignore[attr-defined]
    values = Xkv().profiles(XkvConfig.model_validate({"rank": {"k": 0.5, "v": 0.5}, "share": "v"}), GEOMETRY, [0])
    assert (values[0].k_rank, values[0].v_rank) == (32, 64)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("group: auto", "give both or neither"),
        ("max_error: 0.1", "give both or neither"),
        ("basis: prompt, group: auto, max_error: 0.1", "needs calibration text"),
        ("group: 0", "from 1, or auto"),
        ("group: some", "from 1, or auto"),
        ("share: k", "'kv' or 'v'"),
        ("rank: 1.5", "above 0 and up to 1.0"),
        ("max_error: 2.0, group: auto", "less than 1"),
    ],
)
def test_wrong_fields_are_named(fields: str, words: str) -> None:
    with pytest.raises(ValueError, match=rf"recipe line 3: xkv.*{words}"):
        recipe(listed(f"method: xkv, {fields}"))


def test_what_does_not_fit_is_refused_in_one_sentence(base_model: Path) -> None:
    def plan(*stages: str) -> None:
        planning.make(Checkpoint.open(base_model), recipe(listed(*stages)), str(base_model))

    with pytest.raises(ValueError, match=r"line 3: rank 72 is above head_dim 64"):
        plan("method: xkv, rank: 72")
    with pytest.raises(ValueError, match=r"line 4: xkv stores its latents itself in this form; remove scalar"):
        plan("method: xkv, basis: prompt", "method: scalar, bits: 8")
