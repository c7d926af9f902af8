"""The ways a token can come to be attended: what the canary makes a layer do, as a scheduler would.

Every path is a few steps of one request. Requests have block tables of their own, cut from blocks that nobody uses
yet, out of order; the prefix hit begins with blocks that another request has written.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvcompress.serving.vllm.metadata import Step

_PAGES, _LARGE_PAGES, _LARGE = 3, 2, 64
"""Blocks of a request: a prefix, what comes after it, and an end that does not fill its block; fewer of large ones."""


@dataclass(frozen=True)
class Path:
    """One request: its blocks in order, the block of its ring, and its steps as tokens [start, stop)."""

    name: str
    blocks: tuple[int, ...]
    ring: int
    steps: tuple[tuple[int, int], ...]


def paths(num_blocks: int, block_size: int, lane: int = 0, lanes: int = 1) -> list[Path]:
    """All paths that a cache of so many blocks has room for, in the order they must run.

    Args:
        lane: of layers whose caches are the same memory, which this one is; they get blocks apart from each other.
    """
    # The last blocks of the cache, where offsets are largest; block 0 is the engine's own.
    free = range(num_blocks - 1, 0, -1)
    free = free[lane : len(free) // lanes * lanes : lanes]
    pages = min(_PAGES if block_size <= _LARGE else _LARGE_PAGES, len(free) // 2)
    if pages == 0:
        return []
    ring, first, second = free[0], free[1 : 1 + pages], free[1 + pages : 2 * pages]
    length = (pages - 1) * block_size + block_size // 2 + 1
    table = (*first[1::2], *first[::2])
    found = [
        Path("prefill", table, ring, ((0, length),)),
        Path("decode", table, ring, ((length, length + 1), (length + 1, length + 2))),
    ]
    if pages > 1:
        steps = ((block_size, length), (length, length + 1))
        found.append(Path("prefix hit", (table[0], *second), ring, steps))
    cuts = (0, 7, length // 2 + 2, length)
    found.append(Path("chunked prefill", table[::-1], ring, tuple(pairwise(cuts))))
    return found


def metadata(path: Path, step: tuple[int, int], block_size: int, device: torch.device) -> Step:
    """A step as the engine would describe it to a layer."""
    start, stop = step
    table = torch.tensor([path.blocks], dtype=torch.int32, device=device)
    positions = torch.arange(start, stop, device=device)
    return Step(
        num_actual_tokens=stop - start,
        slot_mapping=table[0].long()[positions // block_size] * block_size + positions % block_size,
        block_table=table,
        query_starts=torch.tensor([0, stop - start], dtype=torch.int32),
        seq_lens=torch.tensor([stop], dtype=torch.int32),
    )


def ring_metadata(path: Path, device: torch.device) -> Step:
    """The same of a ring: all that is looked at is its block."""
    nothing = torch.zeros(0, dtype=torch.int32)
    return Step(0, nothing, torch.tensor([[path.ring]], device=device), nothing, nothing)


def stretched(x_THD: Tensor, tokens: int) -> Tensor:
    """As many tokens as a path needs, from the start again where there are not enough."""
    return x_THD[torch.arange(tokens, device=x_THD.device) % x_THD.shape[0]]
