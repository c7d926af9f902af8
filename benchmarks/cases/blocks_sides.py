"""Blocks that the CUDA kernels are tested with, by emulation and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.codec.blocks.spec import BlockSide

BAR = 2e-3
"""Relative error of the output: half-precision queries and weights; measured are 2e-4 to 5e-4."""


def cuda_sides(
    rank: int,
    bits: int,
    v_rank: int | None = None,
    v_bits: int | None = None,
    group: int = 64,
    low_rank: int = 2,
    outliers: int = 40,
) -> tuple[BlockSide, BlockSide]:
    """Specs of keys and values in blocks of 64 tokens."""
    v_rank, v_bits = v_rank or rank, v_bits or bits
    return (
        BlockSide(64, rank, bits, "tokens", 64, low_rank, 2, outliers),
        BlockSide(64, v_rank, v_bits, "channels", min(group, v_rank), low_rank, 2, outliers),
    )


# Every instance of csrc/cuda/blocks/api.cu; one and two columns of channels, whole or not, of one scale or two; every
# part that may be absent; ranks of the residual at both ends; numbers of outliers that fill a warp's lanes, and do not.
SHAPES = [
    (64, cuda_sides(64, 8)),
    (128, cuda_sides(128, 8, outliers=168)),
    (64, cuda_sides(64, 4)),
    (128, cuda_sides(128, 4, outliers=168)),
    (128, cuda_sides(128, 4, group=128, low_rank=0)),
    (128, cuda_sides(96, 4, v_rank=80, low_rank=8, outliers=8)),
    (64, cuda_sides(64, 4, outliers=0)),
    (64, cuda_sides(64, 4, v_bits=2, low_rank=4)),
    (128, cuda_sides(128, 4, v_rank=48, v_bits=2, outliers=64)),
    (64, cuda_sides(64, 2, low_rank=0, outliers=0)),
    (128, cuda_sides(128, 2, outliers=168)),
    (256, cuda_sides(16, 2, v_rank=128)),
]


def random_query(tokens: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, heads, head_dim, generator=torch.Generator().manual_seed(9)).to(dtype)
