"""Ranks for many matrices from one exact budget of parameters. No torch.

A matrix `[out, in]` of rank r is stored in r (out + in) numbers, or left dense in out * in. Near the break-even rank
dense is by far the better buy, so a matrix's choices are its useful ranks and dense, and a budget is spent along the
lower convex hull of its error over its size (Lagrangian relaxation of the knapsack: Everett, 1963), most error removed
per parameter first. What then remains is brought to zero by single ranks, so that every allocation of one budget
makes a checkpoint of the same size.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Ranks = list[int | None]
"""One entry per matrix; None leaves it dense."""

_ATTEMPTS = 64
"""How often to take back one more dense matrix while the budget cannot be met exactly."""


@dataclass(frozen=True)
class Shape:
    """A weight matrix `[out_features, in_features]`."""

    out_features: int
    in_features: int

    @property
    def size(self) -> int:
        """Parameters when dense."""
        return self.out_features * self.in_features

    @property
    def cost(self) -> int:
        """Parameters per rank."""
        return self.out_features + self.in_features

    @property
    def max_rank(self) -> int:
        """The largest rank that saves parameters; 0 where none does."""
        return (self.size - 1) // self.cost

    def parameters(self, rank: int | None) -> int:
        return self.size if rank is None else rank * self.cost


def uniform(shapes: Sequence[Shape], removed: float) -> Ranks:
    """The same share of every matrix's parameters removed, or a little more: ranks are rounded down."""
    ranks: Ranks = []
    for shape in shapes:
        rank = max(1, int((1.0 - removed) * shape.size / shape.cost))
        ranks.append(rank if removed > 0.0 and rank <= shape.max_rank else None)
    return ranks


def by_importance(shapes: Sequence[Shape], importance: Sequence[float]) -> list[Array]:
    """Errors for `allocate` under which the share of parameters a matrix keeps is proportional to its importance.

    That is -importance * size * log(share): its slope by parameters is importance / share.
    """
    return [
        -weight * shape.size * np.log(np.arange(1, shape.max_rank + 1) * shape.cost / shape.size)
        for shape, weight in zip(shapes, importance, strict=True)
    ]


def allocate(shapes: Sequence[Shape], errors: Sequence[Array], nominal: Ranks) -> Ranks:
    """Ranks with a small sum of errors that take exactly the parameters of `nominal`.

    Args:
        errors: for each matrix, the error at ranks 1 to its `max_rank`; dense has none.
        nominal: an allocation that sets the budget; also what is returned should no other one be found.
    """
    budget = sum(shape.parameters(rank) for shape, rank in zip(shapes, nominal, strict=True))
    free = [index for index, shape in enumerate(shapes) if shape.max_rank]
    budget -= sum(shape.size for shape in shapes if not shape.max_rank)
    best = _allocate([shapes[index] for index in free], [errors[index] for index in free], budget)
    if best is None:
        return nominal
    ranks: Ranks = [None] * len(shapes)
    for index, rank in zip(free, best, strict=True):
        ranks[index] = rank
    assert sum(map(Shape.parameters, shapes, ranks)) == sum(map(Shape.parameters, shapes, nominal))
    return ranks


def _allocate(shapes: Sequence[Shape], errors: Sequence[Array], budget: int) -> Ranks | None:
    purchases = sorted(
        (-gain, index, size, rank)
        for index, (shape, error) in enumerate(zip(shapes, errors, strict=True))
        for gain, size, rank in _hull(shape, error)
    )
    left = budget - sum(shape.cost for shape in shapes)
    if left < 0:
        return None
    bought: list[tuple[int, int | None]] = []
    too_dear: set[int] = set()
    for _, index, size, rank in purchases:
        if size > left:
            too_dear.add(index)  # and so is what this matrix could buy after it
        elif index not in too_dear:
            left -= size
            bought.append((index, rank))
    # Ranks of one cost reach only multiples of it, so a retry has a matrix of every cost factored.
    dense = [position for position, (_, rank) in enumerate(bought) if rank is None]
    last = {shapes[bought[position][0]].cost: position for position in dense}
    attempts = [set[int]()] + [{*last.values(), *dense[len(dense) - more :]} for more in range(_ATTEMPTS)]
    for taken_back in attempts:
        ranks: Ranks = [1] * len(shapes)
        for position, (index, rank) in enumerate(bought):
            if position not in taken_back:
                ranks[index] = rank
        if _spend(shapes, errors, ranks, budget - sum(map(Shape.parameters, shapes, ranks))):
            return ranks
    return None


def _hull(shape: Shape, error: Array) -> list[tuple[float, int, int | None]]:
    """Steps along the lower convex hull from rank 1 to dense: (error removed per parameter, parameters, new rank)."""
    points: list[tuple[int, float, int | None]] = [
        (rank * shape.cost, float(value), rank) for rank, value in enumerate(error, 1)
    ]
    points.append((shape.size, 0.0, None))
    hull: list[tuple[int, float, int | None]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(_slope(low, high), high[0] - low[0], high[2]) for low, high in itertools.pairwise(hull)]


def _slope(low: tuple[int, float, int | None], high: tuple[int, float, int | None]) -> float:
    return (low[1] - high[1]) / (high[0] - low[0])


def _spend(shapes: Sequence[Shape], errors: Sequence[Array], ranks: Ranks, left: int) -> bool:
    """Change factored matrices rank by rank until nothing is left; False if that cannot be done."""
    factored = {index: rank for index, rank in enumerate(ranks) if rank is not None}

    def gain(index: int, rank: int) -> float:
        """Error removed per parameter between a rank and the next."""
        return float(errors[index][rank - 1] - errors[index][rank]) / shapes[index].cost

    heap = [(-gain(index, rank), index) for index, rank in factored.items() if rank < shapes[index].max_rank]
    heapq.heapify(heap)
    while heap:
        _, index = heapq.heappop(heap)
        if shapes[index].cost <= left:
            factored[index] += 1
            left -= shapes[index].cost
            if factored[index] < shapes[index].max_rank:
                heapq.heappush(heap, (-gain(index, factored[index]), index))
    steps = _steps_to_zero(left, sorted({shapes[index].cost for index in factored}))
    if steps is None:
        return False
    for step in steps:
        same = [index for index in factored if shapes[index].cost == abs(step)]
        up = [index for index in same if factored[index] < shapes[index].max_rank]
        down = [index for index in same if factored[index] > 1]
        if not (up if step > 0 else down):
            return False
        if step > 0:
            factored[max(up, key=lambda index: gain(index, factored[index]))] += 1
        else:
            factored[min(down, key=lambda index: gain(index, factored[index] - 1))] -= 1
    for index, rank in factored.items():
        ranks[index] = rank
    return True


def _steps_to_zero(left: int, costs: Sequence[int]) -> list[int] | None:
    """The fewest costs, spent (positive) or got back (negative), that use up exactly `left`."""
    limit = left + 2 * max(costs, default=0)
    came_by: dict[int, int] = {left: 0}
    queue = deque([left])
    while queue and 0 not in came_by:
        at = queue.popleft()
        for cost in costs:
            for step in (cost, -cost):
                if abs(at - step) <= limit and at - step not in came_by:
                    came_by[at - step] = step
                    queue.append(at - step)
    if 0 not in came_by:
        return None
    steps: list[int] = []
    at = 0
    while came_by[at]:
        steps.append(came_by[at])
        at += came_by[at]
    return sorted(steps)
