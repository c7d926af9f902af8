"""Block codecs for tests, and the rule they must follow in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.codec.blocks.codec import BlocksCodec, BlockSideCodec
from kvcompress.codec.blocks.spec import Axis, BlockSide

HEADS, GROUP, HEAD_DIM, BLOCK = 2, 3, 32, 32
SCALE = HEAD_DIM**-0.5


def side(
    along: Axis, bits: int = 2, low_rank: int = 2, outliers: int = 24, rank: int = 24, group: int = 16
) -> BlockSide:
    return BlockSide(BLOCK, rank, bits, along, group, low_rank, 3, outliers)


def side_codec(spec: BlockSide, seed: int) -> BlockSideCodec:
    """A random well-conditioned basis that is not orthogonal, as the attention metric gives."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(HEAD_DIM) + 0.1 * torch.randn(HEADS, HEAD_DIM, HEAD_DIM, generator=generator)
    return BlockSideCodec(
        spec,
        torch.randn(HEADS, HEAD_DIM, generator=generator),
        mixing[..., : spec.rank].contiguous(),
        torch.linalg.inv(mixing)[:, : spec.rank].contiguous(),
        torch.linspace(2, 0.2, spec.rank).repeat(HEADS, 1),
    )


def codec(bits: int = 4, rank: int = 24) -> BlocksCodec:
    return BlocksCodec(side_codec(side("tokens", bits, rank=rank), 1), side_codec(side("channels", bits, rank=rank), 2))


def by_the_rule(query: Tensor, exact: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor], position: int) -> Tensor:
    """One query's attention in float64, from the rule alone; `stored` are tokens as they come back from blocks."""
    complete = (position + 1) // BLOCK * BLOCK
    k, v = (
        torch.cat([old[:complete].double(), new[complete : position + 1].double()])
        for old, new in zip(stored, exact, strict=True)
    )
    scores = torch.einsum("hgd,thd->hgt", query.double(), k) * SCALE
    return torch.einsum("hgt,thd->hgd", scores.softmax(-1), v)
