"""Hadamard rotations: they spread a few large channels over all of a head."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard(size: int) -> Tensor:
    """Orthonormal symmetric matrix `[size, size]`: Sylvester's, block-diagonal where `size` is no power of two.

    The blocks are as large as the largest power of two that divides `size`: 3 of 32 for 96 channels.
    """
    block = size & -size
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / math.sqrt(block)] * (size // block))


def rotated(states: Tensor, rotation_DD: Tensor) -> Tensor:
    """States `[..., D]` in the rotation's coordinates; `rotated(_, rotation.mT)` is the way back."""
    return states @ rotation_DD.to(states)
