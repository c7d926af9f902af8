from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress.methods.ranks import Ranks, Shape, allocate, by_importance, uniform

LAYER = [Shape(192, 192), Shape(128, 192), Shape(128, 192), Shape(192, 192), Shape(512, 192), Shape(192, 512)]


def total(shapes: list[Shape], ranks: Ranks) -> int:
    return sum(shape.parameters(rank) for shape, rank in zip(shapes, ranks, strict=True))


def errors_of(shapes: list[Shape], seed: int) -> list[np.ndarray]:
    """Tail sums of decaying spectra of different sizes and speeds."""
    generator = np.random.default_rng(seed)
    found = []
    for shape in shapes:
        size = min(shape.out_features, shape.in_features)
        energy = np.exp(-np.arange(size) / size * generator.uniform(0.5, 8)) * generator.lognormal()
        found.append(np.cumsum(energy[::-1])[::-1][1 : shape.max_rank + 1])
    return found


def loss(errors: list[np.ndarray], ranks: Ranks) -> float:
    return sum(0.0 if rank is None else error[rank - 1] for error, rank in zip(errors, ranks, strict=True))


def test_the_largest_rank_still_saves_and_the_next_does_not() -> None:
    for shape in [*LAYER, Shape(7, 5), Shape(100, 1)]:
        assert shape.max_rank * shape.cost < shape.size <= (shape.max_rank + 1) * shape.cost


def test_uniform_removes_at_least_the_share_and_at_most_one_rank_more() -> None:
    for removed in (0.1, 0.2, 0.3, 0.9):
        for shape, rank in zip(LAYER, uniform(LAYER, removed), strict=True):
            assert rank is not None
            assert 0 <= (1 - removed) * shape.size - rank * shape.cost < shape.cost
    assert uniform(LAYER, 0.0) == [None] * len(LAYER)
    assert uniform([Shape(100, 1)], 0.5) == [None]


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.builds(Shape, st.integers(2, 70), st.integers(2, 70)), min_size=1, max_size=9),
    removed=st.sampled_from([0.02, 0.1, 0.2, 0.3, 0.5, 0.8]),
    seed=st.integers(0, 1000),
)
def test_every_allocation_takes_exactly_the_nominal_parameters(shapes: list[Shape], removed: float, seed: int) -> None:
    nominal, errors = uniform(shapes, removed), errors_of(shapes, seed)
    importance = np.random.default_rng(seed).lognormal(size=len(shapes)).tolist()
    for found in (allocate(shapes, errors, nominal), allocate(shapes, by_importance(shapes, importance), nominal)):
        assert total(shapes, found) == total(shapes, nominal)
        assert all(rank is None or 1 <= rank <= shape.max_rank for shape, rank in zip(shapes, found, strict=True))


@pytest.mark.parametrize("removed", [0.05, 0.1, 0.2, 0.3, 0.6])
def test_error_allocation_is_close_to_the_best_there_is(removed: float) -> None:
    """The best of any allocation with this many parameters, by dynamic programming over the exact budget."""
    shapes = [Shape(shape.out_features // 8, shape.in_features // 8) for shape in LAYER * 8]
    nominal, errors = uniform(shapes, removed), errors_of(shapes, 1)
    budget = total(shapes, nominal) // 8  # all sizes are multiples of 8
    best = np.full(budget + 1, np.inf)
    best[0] = 0.0
    for shape, error in zip(shapes, errors, strict=True):
        after = np.full(budget + 1, np.inf)
        for size, value in [
            *((rank * shape.cost, error[rank - 1]) for rank in range(1, shape.max_rank + 1)),
            (shape.size, 0.0),
        ]:
            steps = size // 8
            after[steps:] = np.minimum(after[steps:], best[: budget + 1 - steps] + value)
        best = after
    found = loss(errors, allocate(shapes, errors, nominal))
    assert best[budget] - 1e-9 <= found <= best[budget] + 0.01 * (loss(errors, nominal) - best[budget])


def test_errors_of_many_layers_fall_well_below_uniform() -> None:
    shapes = LAYER * 8
    for removed in (0.1, 0.2, 0.3):
        nominal, errors = uniform(shapes, removed), errors_of(shapes, 2)
        found = allocate(shapes, errors, nominal)
        assert total(shapes, found) == total(shapes, nominal)
        assert loss(errors, found) < 0.5 * loss(errors, nominal)


def test_kept_shares_follow_importance() -> None:
    shapes = [Shape(512, 512)] * 4
    importance = [1.0, 2.0, 3.0, 100.0]
    ranks = allocate(shapes, by_importance(shapes, importance), uniform(shapes, 0.6))
    assert ranks[3] is None, "what it would get is more than a dense matrix takes"
    first, second, third = (rank or 0 for rank in ranks[:3])
    assert second / first == pytest.approx(2, rel=0.1)
    assert third / first == pytest.approx(3, rel=0.1)
