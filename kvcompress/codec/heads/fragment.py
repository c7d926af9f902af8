"""Pages in `fragment` order: where each bit lies, and the exact way there from `token_major` order and back.

A tensor core multiplies a 16 x 16 tile (mma.m16n8k16) of which every lane of a warp holds eight entries. Keys enter as
tokens x channels, values as channels x tokens. A record in this order lets a lane load its own entries, and nobody
else's, with one wide load, and turn them into halves by logic operations alone.

A record is a sequence of chunks of 64 tokens (`codec.layout`). In a chunk, token 16 f + 8 i + g (f < 4, i < 2, g < 8)
is entry 8 g + 2 f + i of the gains, of the outliers and of their channel numbers: a lane needs the eight tokens of
one g. The codes of eight neighbouring channels (no band is narrower) and 64 tokens are one unit of 64 * bits bytes, in
which lane 4 g + t (t < 4) has bits / 2 words of 32 bits. Pair j = 2 f + i of a lane is two entries, e = 0 and 1:

    keys      token 16 f + 8 i + g            channel 2 t + e
    values    token 16 f + 8 i + 2 t + e      channel g

A word holds 16 / bits pairs: pair j is in word j // (16 / bits), its entry e at bit 16 e + bits * (j % (16 / bits)).
Words of a lane follow each other; of 16-bit channels, whose lanes have eight, the first four of all lanes come before
the last four. Units lie in the order of their channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kvcompress.codec.bands import CHANNEL_GROUP, Band, SideSpec
from kvcompress.codec.heads.layout import PageLayout
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.codec.layout import CHUNK_TOKENS, FRAGMENT

_LANES = 32


def to_fragment(pages_NHX: Tensor, layer: HeadsSpec, block_size: int) -> Tensor:
    """Records `uint8 [blocks, heads, record bytes]` from `token_major` to `fragment` order.

    Raises:
        ValueError: there is no such layout (`PageLayout.of`).
    """
    found_NHX = torch.empty_like(pages_NHX, memory_format=torch.contiguous_format)
    _convert(pages_NHX, found_NHX, layer, block_size, reverse=False)
    return found_NHX


def to_token_major(pages_NHX: Tensor, layer: HeadsSpec, block_size: int) -> Tensor:
    """Inverse of `to_fragment`."""
    found_NHX = torch.empty_like(pages_NHX, memory_format=torch.contiguous_format)
    _convert(found_NHX, pages_NHX, layer, block_size, reverse=True)
    return found_NHX


def _convert(token_major_NHX: Tensor, fragment_NHX: Tensor, layer: HeadsSpec, block_size: int, reverse: bool) -> None:
    places = PageLayout.of(layer, block_size), PageLayout.of(layer, block_size, FRAGMENT)
    assert token_major_NHX.shape[-1] == fragment_NHX.shape[-1] == places[0].record_bytes
    chunks = block_size // CHUNK_TOKENS
    for side, keys, start, target in (
        (layer.k, True, places[0].k, places[1].k),
        (layer.v, False, places[0].v, places[1].v),
    ):
        for number, width in enumerate(side.part_bytes):
            if not width:
                continue
            size = CHUNK_TOKENS * width
            # [blocks, heads, chunks, bytes of the part in a chunk]
            rows = token_major_NHX[..., start[number] : start[number] + chunks * size].unflatten(-1, (chunks, size))
            units = fragment_NHX.unflatten(-1, (chunks, -1))[..., target[number] : target[number] + size]
            is_codes = number == len(side.part_bytes) - 1
            for change, first, last in _pieces(side, keys) if is_codes else [(_tokens(width), 0, width)]:
                # The bytes of each token, and where they go.
                row = rows.unflatten(-1, (CHUNK_TOKENS, width))[..., first:last]
                unit = units[..., CHUNK_TOKENS * first : CHUNK_TOKENS * last]
                if reverse:
                    row.copy_(change(unit, True))
                else:
                    unit.copy_(change(row, False))


_Change = Callable[[Tensor, bool], Tensor]
"""Bytes `[..., 64, width]` to `[..., 64 * width]`, or back."""


def _tokens(width: int) -> _Change:
    entry = torch.arange(CHUNK_TOKENS)
    g, f, i = entry // 8, entry // 2 % 4, entry % 2
    token = 16 * f + 8 * i + g

    def change(x: Tensor, reverse: bool) -> Tensor:
        if reverse:
            found: Tensor = x.unflatten(-1, (CHUNK_TOKENS, width))[..., token.argsort().to(x.device), :]
            return found
        return x[..., token.to(x.device), :].flatten(-2)

    return change


def _pieces(side: SideSpec, keys: bool) -> list[tuple[_Change, int, int]]:
    """How each band's bytes change, and which of a token's bytes they are."""
    pieces, first = [], 0
    for band in side.bands:
        last = first + band.nbytes
        pieces.append((_codes(band, keys), first, last))
        first = last
    return pieces


def _codes(band: Band, keys: bool) -> _Change:
    code, order = band.code, unit_order(band.bits, keys)
    units, entries = band.width // CHANNEL_GROUP, CHUNK_TOKENS * CHANNEL_GROUP

    def change(x: Tensor, reverse: bool) -> Tensor:
        numbers = code.unpack(x)
        if reverse:
            numbers = numbers.unflatten(-1, (units, entries))[..., order.argsort().to(x.device)]
            return code.pack(numbers.unflatten(-1, (CHUNK_TOKENS, CHANNEL_GROUP)).transpose(-3, -2).flatten(-2))
        # [..., tokens, units, channels] to [..., units, tokens and channels]
        numbers = numbers.unflatten(-1, (units, CHANNEL_GROUP)).transpose(-3, -2).flatten(-2)
        return code.pack(numbers[..., order.to(x.device)].flatten(-2))

    return change


@functools.cache
def unit_order(bits: int, keys: bool) -> Tensor:
    """Which entry (token * 8 + channel) of a unit is stored at which place: int64 `[512]`."""
    pairs_per_word, words = 16 // bits, bits // 2
    pieces = max(1, words // 4)
    piece, lane, word, e, slot = torch.meshgrid(
        *(torch.arange(n) for n in (pieces, _LANES, words // pieces, 2, pairs_per_word)), indexing="ij"
    )
    j = (piece * (words // pieces) + word) * pairs_per_word + slot
    g, t, f, i = lane // 4, lane % 4, j // 2, j % 2
    token = 16 * f + 8 * i + (g if keys else 2 * t + e)
    channel = 2 * t + e if keys else g
    return (token * CHANNEL_GROUP + channel).flatten()
