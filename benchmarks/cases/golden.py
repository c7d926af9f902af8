"""Golden pages: keys and values made of whole numbers, and the bytes that the torch code stores them as."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases.heads import bands
from kvcompress.codec.bands import SideSpec
from kvcompress.codec.heads import fragment, pages
from kvcompress.codec.heads.codec import HeadsCodec, SideCodec
from kvcompress.codec.heads.layout import PageLayout

HEAD_DIM, HEADS, BLOCK_SIZE = 32, 2, 64

SIDES = {
    "4 and 2 bits": (bands((4, 32)), bands((2, 24))),
    "16 and 8 bits": (bands((16, 8)), bands((8, 24))),
    "bands and outliers": (bands((8, 8), (4, 8), (2, 16), outliers=2), bands((4, 8), (2, 24), outliers=1)),
}


class Golden(NamedTuple):
    """One block of tokens `[64, heads, head_dim]` and its records `[heads, record bytes]`."""

    codec: HeadsCodec
    keys_THD: Tensor
    values_THD: Tensor
    token_major_HX: Tensor
    fragment_HX: Tensor


def make(name: str) -> Golden:
    """What the torch code stores now."""
    codec = codec_of(*SIDES[name])
    layout = PageLayout.of(codec.spec, BLOCK_SIZE)
    pages_NHX = torch.zeros(1, HEADS, layout.record_bytes, dtype=torch.uint8)
    pages.append(pages_NHX, layout, codec, tokens(0), tokens(1), torch.arange(BLOCK_SIZE))
    return Golden(codec, tokens(0), tokens(1), pages_NHX[0], fragment.to_fragment(pages_NHX, codec.spec, BLOCK_SIZE)[0])


def codec_of(k: SideSpec, v: SideSpec) -> HeadsCodec:
    """No rotation and no mean, scales powers of two: the projection has no rounding."""

    def side(spec: SideSpec) -> SideCodec:
        identity_HDR = torch.eye(HEAD_DIM)[:, : spec.rank].expand(HEADS, -1, -1).contiguous()
        scale_HR = torch.tensor([2.0, 1.0, 0.5, 0.25]).repeat_interleave(8)[: spec.rank].expand(HEADS, -1).contiguous()
        return SideCodec(spec, torch.zeros(HEADS, HEAD_DIM), identity_HDR, identity_HDR.mT.contiguous(), scale_HR)

    return HeadsCodec(side(k), side(v))


def tokens(side: int) -> Tensor:
    """`[64, heads, head_dim]`, multiples of 1/32 between -4 and 4; the generator's numbers belong to no library."""
    state, found = 12345 + side, []
    for _ in range(BLOCK_SIZE * HEADS * HEAD_DIM):
        state = (1103515245 * state + 12345) % 2**31
        found.append((state >> 16) % 257 - 128)
    return torch.tensor(found).view(BLOCK_SIZE, HEADS, HEAD_DIM) / 32
