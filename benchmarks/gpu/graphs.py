"""CUDA graphs of what is checked."""

from __future__ import annotations

from collections.abc import Callable

import torch


def capture(step: Callable[[], None], device: str) -> Callable[[], None]:
    """A graph of what a step launches, to be replayed; the step itself where there are no graphs, in the emulation."""
    if device == "cpu":
        step()
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # which fills what the step reads
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()

    def replay() -> None:
        captured.replay()
        torch.cuda.synchronize()

    return replay
