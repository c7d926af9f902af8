"""Cuts samples out of several kinds of text so that every set of samples, large or small, sees all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Ids = np.ndarray[Any, np.dtype[np.int64]]


class Stream:
    """Documents of one kind, one after the other.

    Args:
        documents: token ids of each.
    """

    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        self.ids: Ids = np.fromiter((token for ids in documents for token in ids), np.int64)
        sizes = [len(ids) for ids in documents if len(ids)]
        self.starts: Ids = np.cumsum([0, *sizes[:-1]], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def place(self, low: int, high: int, generator: np.random.Generator) -> int:
        """Where to cut between two positions: at the start of a document if one begins there, else anywhere."""
        inside = self.starts[(self.starts >= low) & (self.starts < high)]
        return int(generator.choice(inside)) if len(inside) else int(generator.integers(low, max(low + 1, high)))


def cut(
    streams: Sequence[Stream], samples: int, length: int, generator: np.random.Generator, bos: int | None = None
) -> list[Ids]:
    """`samples` times `length` tokens.

    Kinds take turns, sample by sample; where there are fewer samples than kinds, a sample has parts of several. Each
    stream's cuts are spread over the whole of it.

    Args:
        streams: at least `length` tokens together.
        bos: what comes before every sample, left out where the text has it already, as chat templates do.
    """
    turns = _turns([len(stream) for stream in streams], samples, length, generator)
    parts: dict[tuple[int, int], Ids] = {}
    for kind, stream in enumerate(streams):
        mine = [
            (sample, part, size)
            for sample, plan in enumerate(turns)
            for part, (k, size) in enumerate(plan)
            if k == kind
        ]
        for at, (sample, part, size) in zip(generator.permutation(len(mine)).tolist(), mine, strict=True):
            room = len(stream) - size + 1
            start = stream.place(room * at // len(mine), room * (at + 1) // len(mine), generator)
            if part == 0 and stream.ids[start] == bos and start + 1 < room:
                start += 1
            parts[sample, part] = stream.ids[start : start + size]
    return [np.concatenate([parts[sample, part] for part in range(len(plan))]) for sample, plan in enumerate(turns)]


def _turns(
    sizes: Sequence[int], samples: int, length: int, generator: np.random.Generator
) -> list[list[tuple[int, int]]]:
    """For every sample the kinds in it and how many tokens of each."""
    order = [int(kind) for kind in generator.permutation(len(sizes)) if sizes[kind]]
    usual = -(-length // max(1, -(-len(order) // samples)))
    turn = 0
    plans: list[list[tuple[int, int]]] = []
    for _ in range(samples):
        plan: list[tuple[int, int]] = []
        left = length
        while left:
            kind = order[turn % len(order)]
            size = min(usual, left, sizes[kind])
            plan.append((kind, size))
            left -= size
            turn += 1
        plans.append(plan)
    return plans
