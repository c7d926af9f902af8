"""A trainable low-rank difference of one matrix, for `torch.nn.utils.parametrize`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRankDifference(nn.Module):
    """W to W + up @ down; `down` is random and `up` zero at first, so training starts at W itself."""

    def __init__(self, shape: tuple[int, int], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = shape
        self.down = nn.Parameter(torch.randn(rank, columns, generator=generator) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down
