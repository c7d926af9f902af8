"""Time on the device: a captured graph of several calls, replayed; and what its memory can do."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch

CEILING_BYTES = 8 * 10**9


def microseconds(step: Callable[[int], None], copies: int, replays: int = 30) -> list[float]:
    """Time of one call of `step`, by replay. A graph calls it for every copy of the data, so that no call finds its own
    in the cache."""
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        for copy in range(copies):
            step(copy)
    warm.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            step(copy)
    for _ in range(3):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [1000 * first.elapsed_time(second) / copies for first, second in itertools.pairwise(events)]
    del graph
    return times


def ceilings() -> dict[str, float]:
    """Bytes per second that reading alone and copying reach, over 8 GB."""
    data = torch.ones(CEILING_BYTES // 4, dtype=torch.float32, device="cuda")
    total = torch.empty((), device="cuda")
    first, second = data.chunk(2)

    def read(_: int) -> None:
        torch.sum(data, 0, out=total)

    def copy(_: int) -> None:
        first.copy_(second)

    return {
        f"{name}_bytes_per_s": CEILING_BYTES / statistics.median(microseconds(step, 1, 10)) * 1e6
        for name, step in (("read", read), ("copy", copy))
    }
