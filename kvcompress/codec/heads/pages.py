"""Cache pages: writing encoded tokens into records and reading them back.

`pages_NHX` is `uint8 [num_blocks, num_kv_heads, record_bytes]`; the block dimension may be strided (an engine packs
the pages of several layers into one block), the record itself is contiguous. A slot is block * block_size + offset.
Records in `fragment` order are converted on the way: right, and slow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.codec.heads import fragment
from kvcompress.codec.heads.codec import HeadsCodec
from kvcompress.codec.heads.layout import PageLayout
from kvcompress.codec.layout import FRAGMENT
from kvcompress.codec.record import Record


def append(
    pages_NHX: Tensor, layout: PageLayout, codec: HeadsCodec, keys_THD: Tensor, values_THD: Tensor, slots_T: Tensor
) -> None:
    """Encode tokens and store them in their slots. Slots below 0 are padding and are skipped."""
    valid = slots_T >= 0
    if not bool(valid.all()):
        keys_THD, values_THD, slots_T = keys_THD[valid], values_THD[valid], slots_T[valid]
    if layout.order == FRAGMENT:
        _append_fragment(pages_NHX, layout, codec, keys_THD, values_THD, slots_T)
        return
    block_T, offset_T = slots_T // layout.block_size, slots_T % layout.block_size
    for side, place, x_THD in ((codec.k, layout.k, keys_THD), (codec.v, layout.v, values_THD)):
        for bytes_THX, offset in zip(side.encode(x_THD).to_parts(), place, strict=True):
            if bytes_THX is not None:
                _part(pages_NHX, layout, offset, bytes_THX.shape[-1])[block_T, :, offset_T] = bytes_THX


def read(
    pages_NHX: Tensor, layout: PageLayout, codec: HeadsCodec, blocks_N: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Normalized latents (k_THR, v_THR) in float32 of the first `length` tokens of a block table."""
    if layout.order == FRAGMENT:
        pages_NHX = fragment.to_token_major(pages_NHX[blocks_N], codec.spec, layout.block_size)
        layout = PageLayout.of(codec.spec, layout.block_size)
        blocks_N = torch.arange(len(blocks_N), device=blocks_N.device)
    latents = []
    for side, place in ((codec.k, layout.k), (codec.v, layout.v)):
        parts = [
            _gather(_part(pages_NHX, layout, offset, width), blocks_N, length) if width else None
            for offset, width in zip(place, side.spec.part_bytes, strict=True)
        ]
        latents.append(side.decode(Record.from_parts(parts)))
    return latents[0], latents[1]


def _append_fragment(
    pages_NHX: Tensor, layout: PageLayout, codec: HeadsCodec, keys_THD: Tensor, values_THD: Tensor, slots_T: Tensor
) -> None:
    """Convert the blocks that are written to, write, and convert them back."""
    block_T, offset_T = slots_T // layout.block_size, slots_T % layout.block_size
    touched_N, place_T = block_T.unique(return_inverse=True)
    some_NHX = fragment.to_token_major(pages_NHX[touched_N], codec.spec, layout.block_size)
    token_major = PageLayout.of(codec.spec, layout.block_size)
    append(some_NHX, token_major, codec, keys_THD, values_THD, place_T * layout.block_size + offset_T)
    pages_NHX[touched_N] = fragment.to_fragment(some_NHX, codec.spec, layout.block_size)


def _part(pages_NHX: Tensor, layout: PageLayout, offset: int, width: int) -> Tensor:
    """One part of every record as a view `[num_blocks, heads, block_size, width]`."""
    assert offset >= 0
    part: Tensor = pages_NHX[:, :, offset : offset + layout.block_size * width].unflatten(
        -1, (layout.block_size, width)
    )
    return part


def _gather(part_NHSX: Tensor, blocks_N: Tensor, length: int) -> Tensor:
    """Blocks in order, tokens first: `[length, heads, width]`."""
    return part_NHSX[blocks_N].transpose(1, 2).flatten(0, 1)[:length]
