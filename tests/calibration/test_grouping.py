"""The bound on the error of layers side by side: it holds, it is worth something, and groups found by it keep it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompress.calibration.grouping import Sketch, group_layers
from kvcompress.calibration.joint import joint_axes
from tests.calibration import xkv_probe

ROOT = Path(__file__).parents[2]


def true_error(blocks: list[Tensor], rank: int) -> float:
    """Relative error of the truncated SVD of the concatenation, from its smallest singular values."""
    singular = torch.linalg.svdvals(torch.cat(blocks, dim=1).double())
    whole = float(singular.square().sum())
    return 0.0 if whole == 0 else (float(singular[rank:].square().sum()) / whole) ** 0.5


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[Tensor], int, int]:
    """Blocks that may share directions, repeat each other, lack rank, differ in size by orders, or be zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens = draw(st.integers(1, 40))
    common = torch.randn(tokens, draw(st.integers(1, 6)), generator=generator, dtype=torch.float64)
    blocks: list[Tensor] = []
    for _ in range(draw(st.integers(1, 5))):
        columns = draw(st.integers(1, 12))
        kind = draw(st.sampled_from(["random", "shared", "repeat", "zero", "decaying"]))
        if kind == "repeat" and blocks:
            block = blocks[-1]
        elif kind == "zero":
            block = torch.zeros(tokens, columns, dtype=torch.float64)
        else:
            block = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
            if kind == "shared":
                mixing = torch.randn(common.shape[1], columns, generator=generator, dtype=torch.float64)
                block = common @ mixing + draw(st.sampled_from([0.0, 1e-9, 1e-6, 1e-3, 0.1])) * block
            if kind == "decaying":
                block = block * torch.logspace(0, -draw(st.integers(0, 9)), columns, dtype=torch.float64)
        blocks.append(block * 10.0 ** draw(st.integers(-4, 4)))
    rank = draw(st.integers(1, sum(block.shape[1] for block in blocks)))
    return blocks, rank, draw(st.integers(1, rank + 8))


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(groups())
def test_predicted_error_is_never_below_the_true_one(case: tuple[list[Tensor], int, int]) -> None:
    blocks, rank, keep = case
    sketch = Sketch.empty(blocks[0].shape[0])
    for block in blocks:
        sketch = sketch.append(block, keep)
    assert sketch.error(rank) >= true_error(blocks, rank) - 1e-9


def related(layers: int = 6, tokens: int = 400, columns: int = 32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, 24, generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, 24)
    noise = 0.05 * torch.randn(layers, tokens, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(layers, 24, columns, generator=generator, dtype=torch.float64)
    return [common @ mixing[layer] + noise[layer] for layer in range(layers)]


def test_bound_is_close_where_little_is_cut_and_exact_where_nothing_is() -> None:
    blocks = related()
    whole, cut = Sketch.empty(400), Sketch.empty(400)
    for block in blocks:
        whole, cut = whole.append(block, 1000), cut.append(block, 32)
    for rank in (4, 16, 32):
        expected = true_error(blocks, rank)
        assert whole.error(rank) == pytest.approx(expected, rel=1e-6)
        assert expected <= cut.error(rank) <= 1.2 * expected


def test_neighbours_merge_until_the_error_or_the_size_is_reached() -> None:
    blocks = dict(enumerate(related()))
    generator = torch.Generator().manual_seed(9)
    stranger = torch.randn(400, 20, generator=generator, dtype=torch.float64) @ torch.eye(20, 32, dtype=torch.float64)
    blocks[3] = stranger * blocks[2].norm() / stranger.norm()

    def found(max_error: float, longest: int) -> list[tuple[int, ...]]:
        return group_layers(list(blocks), lambda index: {"v": blocks[index]}, {"v": 24}, max_error, longest)

    for max_error, groups in ((0.25, [(0, 1, 2), (3,), (4, 5)]), (0.9, [(0, 1, 2, 3, 4, 5)])):
        assert found(max_error, 8) == groups
        for group in groups:
            assert true_error([blocks[index] for index in group], 24) <= max_error
    assert [len(group) for group in found(0.9, 4)] == [4, 2]
    with pytest.raises(ValueError, match=r"values of layer 0 by themselves .* raise rank.v or max_error"):
        found(1e-3, 8)


def test_joint_axes_are_those_of_the_concatenation() -> None:
    blocks = related()
    axes_WXR, variance_R = joint_axes(range(6), blocks.__getitem__, 20)
    joined = torch.cat(blocks, dim=1)
    axes = axes_WXR.flatten(0, 1)
    error = (joined - joined @ axes @ axes.T).norm() / joined.norm()
    assert float(error) == pytest.approx(true_error(blocks, 20), rel=1e-6)
    torch.testing.assert_close(variance_R, torch.linalg.svdvals(joined)[:20].square() / 400)


def test_groups_of_the_reference_model_keep_their_error_on_held_out_text(tmp_path: Path) -> None:
    max_error = 0.25
    errors = xkv_probe.held_out_errors(ROOT / "assets" / "reference-model", max_error, tmp_path)
    assert len(errors) < 16, "no layers share"
    assert all(error <= 1.5 * max_error for error in errors.values()), errors
