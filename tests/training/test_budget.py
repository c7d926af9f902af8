from __future__ import annotations

import itertools

import pytest

from kvcompress.training.budget import Ranks, Slot, greedy_ranks

FULL, STEP = 32, 8


def search(costs: dict[Slot, float], budgets: list[tuple[list[Slot], int]], step: int = STEP) -> tuple[Ranks, int]:
    """Ranks where the loss is a convex function of each slot's rank, and how often it was measured."""
    measured = []

    def loss(ranks: Ranks) -> float:
        measured.append(ranks)
        return sum(cost * (FULL - ranks[slot]) ** 2 for slot, cost in costs.items())

    return greedy_ranks(FULL, step, 8, budgets, loss, lambda *_: None), len(measured)


COSTS: dict[Slot, float] = {(0, 0): 1.0, (0, 1): 5.0, (1, 0): 0.3, (1, 1): 9.0, (1, 2): 2.0, (0, 2): 0.9}


@pytest.mark.parametrize("total", [48, 56, 96, 104, 184, 192])
def test_finds_the_best_ranks_of_a_separable_convex_loss(total: int) -> None:
    found, measured = search(COSTS, [(list(COSTS), total)])
    assert sum(found.values()) == total

    def loss(ranks: tuple[int, ...]) -> float:
        return sum(cost * (FULL - rank) ** 2 for cost, rank in zip(COSTS.values(), ranks, strict=True))

    every = (r for r in itertools.product(range(8, FULL + 1, STEP), repeat=len(COSTS)) if sum(r) == total)
    assert loss(tuple(found[slot] for slot in COSTS)) == pytest.approx(min(map(loss, every)))
    cuts = (FULL * len(COSTS) - total) // STEP
    assert measured <= len(COSTS) + 4 * cuts


def test_budgets_are_kept_apart_and_met_when_the_step_does_not_divide_them() -> None:
    keys, values = [slot for slot in COSTS if slot[0] == 0], [slot for slot in COSTS if slot[0] == 1]
    found, _ = search(COSTS, [(keys, 40), (values, 72)], step=16)
    assert sum(found[slot] for slot in keys) == 40
    assert sum(found[slot] for slot in values) == 72
    assert min(found.values()) >= 8
