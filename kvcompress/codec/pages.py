"""Token-major cache pages: writing encoded tokens into records and reading them back.

`pages_NHX` is `uint8 [num_blocks, num_kv_heads, record_bytes]`; the block dimension may be strided (an engine packs
the pages of several layers into one block), the record itself is contiguous. A slot is block * block_size + offset.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvcompress.codec.layer import LayerCodec, SideCodec
from kvcompress.codec.layout import PageLayout


def append(
    pages_NHX: Tensor, layout: PageLayout, codec: LayerCodec, keys_THD: Tensor, values_THD: Tensor, slots_T: Tensor
) -> None:
    """Encode tokens and store them in their slots. Slots below 0 are padding and are skipped."""
    valid = slots_T >= 0
    if not bool(valid.all()):
        keys_THD, values_THD, slots_T = keys_THD[valid], values_THD[valid], slots_T[valid]
    block_T, offset_T = slots_T // layout.block_size, slots_T % layout.block_size
    for (side, gain_offset, code_offset), x_THD in zip(_sides(layout, codec), (keys_THD, values_THD), strict=True):
        gain_TH, codes_THB = side.encode(x_THD)
        if gain_TH is not None:
            gains_NHSX = _part(pages_NHX, layout, gain_offset, 2)
            gains_NHSX[block_T, :, offset_T] = gain_TH[..., None].contiguous().view(torch.uint8)
        codes_NHSB = _part(pages_NHX, layout, code_offset, codes_THB.shape[-1])
        codes_NHSB[block_T, :, offset_T] = codes_THB


def read(
    pages_NHX: Tensor, layout: PageLayout, codec: LayerCodec, blocks_N: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Normalized latents (k_THR, v_THR) in float32 of the first `length` tokens of a block table."""
    latents = []
    for side, gain_offset, code_offset in _sides(layout, codec):
        codes_THB = _gather(_part(pages_NHX, layout, code_offset, side.spec.code_bytes), blocks_N, length)
        gain_TH = None
        if side.spec.has_gain:
            gain_TH2 = _gather(_part(pages_NHX, layout, gain_offset, 2), blocks_N, length)
            gain_TH = gain_TH2.contiguous().view(torch.float16).squeeze(-1)
        latents.append(side.decode(gain_TH, codes_THB))
    return latents[0], latents[1]


def _sides(layout: PageLayout, codec: LayerCodec) -> Iterator[tuple[SideCodec, int, int]]:
    """Keys, then values: codec, offset of the gains, offset of the codes."""
    yield codec.k, layout.k_gain_offset, layout.k_code_offset
    yield codec.v, layout.v_gain_offset, layout.v_code_offset


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
