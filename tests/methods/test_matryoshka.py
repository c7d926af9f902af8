from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvcompress.checkpoint.manifest import Manifest
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.verify import verify
from kvcompress.pipeline import plan as planning
from kvcompress.serving.loading import load_codec
from kvcompress.serving.transformers import CompressedCache
from kvcompress.training import nested
from tests import compression, tiny
from tests.compression import recipe, tree_sha256

SHORT = "steps: 4, batch: 2, samples: 6, length: 48"
FULL = "rank: 1.0, metric: none, focus: 0.0"


def compress(model: Path, out: Path, stages: str, progress: Any = lambda *_: None, **options: Any) -> Path:
    compression.compress(model, out, stages, progress, **options)
    return out


def matryoshka(options: str, encoding: str = "bits: 16") -> str:
    return f"  - {{method: matryoshka, {SHORT}, {options}}}\n  - {{method: scalar, {encoding}}}\n"


@pytest.fixture(scope="module")
def full(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained at full rank, orthogonal in the space of K and V."""
    return compress(base_model, tmp_path_factory.mktemp("full") / "out", matryoshka(FULL))


def test_trained_bases_are_orthogonal_and_no_longer_the_principal_axes(full: Path, base_model: Path) -> None:
    pca = compress(base_model, full.parent / "pca", "  - {method: pca, metric: none}\n  - {method: scalar, bits: 16}\n")
    for trained, start in zip(load_codec(full), load_codec(pca), strict=True):
        for side in ("k", "v"):
            basis, axes = getattr(trained, side).basis_HDR.double(), getattr(start, side).basis_HDR.double()
            torch.testing.assert_close(basis.mT @ basis, torch.eye(32).double().expand(2, -1, -1), atol=1e-6, rtol=0)
            torch.testing.assert_close(getattr(trained, side).inverse_HRD.double(), basis.mT, atol=1e-6, rtol=0)
            # Half of the channels span another subspace than before.
            overlap = (basis[..., :16].mT @ axes[..., :16]).square().sum((-2, -1))
            assert (overlap < 16 - 1e-5).all()


@pytest.mark.parametrize("metric", ["none", "attention"])
def test_full_rank_reproduces_the_model(metric: str, base_model: Path, tmp_path: Path) -> None:
    out = compress(base_model, tmp_path / "out", matryoshka(f"rank: 1.0, metric: {metric}"))
    model, tokens = tiny.load_model(base_model), torch.tensor(tiny.prompts([200]))
    with torch.no_grad():
        base = model(tokens).logits
        ours = model(tokens, past_key_values=CompressedCache.from_pretrained(out)).logits
    assert (base - ours).abs().max() < 5e-3 * base.abs().max()


def test_first_channels_do_not_depend_on_the_rank_asked_for(full: Path, base_model: Path, tmp_path: Path) -> None:
    half = compress(base_model, tmp_path / "half", matryoshka("rank: 0.5, metric: none, focus: 0.0"))
    for whole, part in zip(load_codec(full), load_codec(half), strict=True):
        for side in ("k", "v"):
            assert torch.equal(getattr(part, side).basis_HDR, getattr(whole, side).basis_HDR[..., :16])
    # Served at half its rank, the whole checkpoint is the other one.
    for cut, part in zip(load_codec(full, kv_rank=0.5), load_codec(half), strict=True):
        assert cut is not None
        assert part is not None
        assert cut.spec == part.spec
        assert all(torch.equal(tensor, part.tensors()[name]) for name, tensor in cut.tensors().items())


@pytest.mark.parametrize("trade", ["true", "false"])
def test_searched_ranks_meet_the_budget_exactly(trade: str, base_model: Path, tmp_path: Path) -> None:
    stages = matryoshka(f"rank: {{k: 0.5, v: 0.75}}, budget: search, trade: {trade}")
    out = compress(base_model, tmp_path / "out", stages)
    layers = Manifest.load(out).layers
    ranks = {side: [layer[side]["rank"] for layer in layers] for side in ("k", "v")}
    assert sum(ranks["k"]) + sum(ranks["v"]) == tiny.NUM_LAYERS * (16 + 24)
    assert all(rank % 8 == 0 and 8 <= rank <= 32 for rank in ranks["k"] + ranks["v"])
    if trade == "false":
        assert (sum(ranks["k"]), sum(ranks["v"])) == (tiny.NUM_LAYERS * 16, tiny.NUM_LAYERS * 24)
    plan = planning.make(Checkpoint.open(base_model), recipe(stages), str(base_model))
    assert Manifest.load(out).bytes_per_token.compressed == plan.bytes_per_token
    assert verify(out).ok


@pytest.mark.parametrize("encoding", ["bits: {k: 4, v: 2}", "target_bits_per_channel: 2.0"])
def test_composes_with_quantized_latents(encoding: str, base_model: Path, tmp_path: Path) -> None:
    out = compress(base_model, tmp_path / "out", matryoshka("rank: 0.75", encoding))
    assert verify(out).ok
    model, cache = tiny.load_model(out), CompressedCache.from_pretrained(out)
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor(tiny.prompts([50])), past_key_values=cache).logits).all()
    assert cache.nbytes == 50 * Manifest.load(out).bytes_per_token.compressed


def test_interrupted_and_resumed_training_gives_the_same_bytes(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcompress.training.distill.SAVE_EVERY", 2)
    stages = matryoshka("rank: 0.5, budget: search")
    whole = compress(base_model, tmp_path / "whole", stages)
    steps_seen: list[int] = []
    for stop in (("training", 3), ("searching ranks", 8)):

        def interrupt(step: str, done: int, total: int, stop: tuple[str, int] = stop) -> None:
            if step == "training":
                steps_seen.append(done)
            if step == stop[0] and done >= stop[1]:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compress(base_model, tmp_path / "out", stages, interrupt, resume=True)
    compress(base_model, tmp_path / "out", stages, resume=True)
    # The second run went on from the state after step 2, not from the beginning.
    assert steps_seen == [0, 1, 2, 3, 2, 3, 4]
    assert tree_sha256(tmp_path / "out") == tree_sha256(whole)


def test_ranks_are_drawn_per_layer_head_and_side_and_some_steps_are_at_the_nominal_rank() -> None:
    drawn = [nested.random_ranks(0, step, 3, 2, 32, (16, 8), focus=0.5) for step in range(200)]
    at_rank = [bool((ranks[0] == 16).all() and (ranks[1] == 8).all()) for ranks in drawn]
    assert 70 < sum(at_rank) < 130
    free = torch.stack([ranks for ranks, fixed in zip(drawn, at_rank, strict=True) if not fixed]).flatten(1)
    assert {int(rank) for rank in free.unique()} == {4, 8, 12, 16, 20, 24, 28, 32}
    assert torch.corrcoef(free.T.float()).fill_diagonal_(0).abs().max() < 0.5
    assert torch.equal(drawn[7], nested.random_ranks(0, 7, 3, 2, 32, (16, 8), focus=0.5))
    # At full rank there is nothing to learn from a nominal step.
    assert not any(bool((nested.random_ranks(0, s, 3, 2, 32, (32, 32), 0.9) == 32).all()) for s in range(50))


def test_seed_changes_the_result(base_model: Path, full: Path, tmp_path: Path) -> None:
    other = compress(base_model, tmp_path / "out", matryoshka(FULL), seed=1)
    pairs = zip(load_codec(full), load_codec(other), strict=True)
    assert not any(torch.equal(one.k.basis_HDR, two.k.basis_HDR) for one, two in pairs)


def test_recomputing_activations_changes_nothing(base_model: Path, full: Path, tmp_path: Path) -> None:
    stages = matryoshka(f"{FULL}, recompute: true")
    again = compress(base_model, tmp_path / "out", stages)
    for one, two in zip(load_codec(full), load_codec(again), strict=True):
        torch.testing.assert_close(one.k.basis_HDR, two.k.basis_HDR, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["Qwen3", "Mistral"])
def test_other_architectures_train(architecture: str, tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base", architecture, vocab_size=300)
    tiny.save_tokenizer(base)
    out = compress(base, tmp_path / "out", matryoshka("rank: 0.5"))
    assert all(0 < layer["relative_error"] < 1 for layer in Manifest.load(out).layers)


def test_layers_with_a_sliding_window_are_left_alone(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    base = tiny.save_model(
        tmp_path / "base", "Qwen2", use_sliding_window=True, sliding_window=16, layer_types=kinds, vocab_size=300
    )
    tiny.save_tokenizer(base)
    out = compress(base, tmp_path / "out", matryoshka("rank: 0.5, budget: search"))
    ranks = [layer["k"] and layer["k"]["rank"] + layer["v"]["rank"] for layer in Manifest.load(out).layers]
    assert ranks[1] is None
    assert sum(rank or 0 for rank in ranks) == 3 * 32
