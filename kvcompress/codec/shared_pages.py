"""Cache pages of a layer that shares a latent: its stripes, and with share "v" the keys of its heads.

A page is `uint8 [page_bytes]`: for keys and then for values, gains (fp16 `[records, block_size]`, absent for 16-bit
channels) and codes (`[records, block_size, code_bytes]`), where a stripe is one record per token and keys with bases
of their own are one per head. A slot is block * block_size + offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.codec.layout import PART_ALIGNMENT
from kvcompress.codec.shared_spec import SharedSpec
from kvcompress.codec.spec import GAIN_BYTES, SideSpec


@dataclass(frozen=True)
class SideLayout:
    """Where one side's gains and codes begin. A gain offset of -1 means that there are none."""

    records: int
    block_size: int
    code_bytes: int
    gain_offset: int
    code_offset: int

    def write(self, pages_NX: Tensor, gain_TH: Tensor | None, codes_THB: Tensor, slots_T: Tensor) -> None:
        """Store encoded tokens in their slots. Slots below 0 are padding and are skipped."""
        valid_T = slots_T >= 0
        block_T, offset_T = slots_T[valid_T] // self.block_size, slots_T[valid_T] % self.block_size
        if gain_TH is not None:
            gains_NHSX = self._part(pages_NX, self.gain_offset, GAIN_BYTES)
            gains_NHSX[block_T, :, offset_T] = gain_TH[valid_T][..., None].contiguous().view(torch.uint8)
        self._part(pages_NX, self.code_offset, self.code_bytes)[block_T, :, offset_T] = codes_THB[valid_T]

    def read(self, pages_NX: Tensor, blocks_N: Tensor, length: int) -> tuple[Tensor | None, Tensor]:
        """(gain_TH or None, codes_THB) of the first `length` tokens of a block table."""
        gain_TH = None
        if self.gain_offset >= 0:
            bytes_TH2 = self._gather(pages_NX, self.gain_offset, GAIN_BYTES, blocks_N, length)
            gain_TH = bytes_TH2.contiguous().view(torch.float16).squeeze(-1)
        return gain_TH, self._gather(pages_NX, self.code_offset, self.code_bytes, blocks_N, length)

    def _gather(self, pages_NX: Tensor, offset: int, width: int, blocks_N: Tensor, length: int) -> Tensor:
        part_NHSX = self._part(pages_NX, offset, width)[blocks_N]
        return part_NHSX.transpose(1, 2).flatten(0, 1)[:length]

    def _part(self, pages_NX: Tensor, offset: int, width: int) -> Tensor:
        """A view `[num_blocks, records, block_size, width]`."""
        shape = (self.records, self.block_size, width)
        part: Tensor = pages_NX[:, offset : offset + self.records * self.block_size * width].unflatten(-1, shape)
        return part


@dataclass(frozen=True)
class SharedLayout:
    """One layer's page."""

    k: SideLayout
    v: SideLayout
    page_bytes: int

    @classmethod
    def of(cls, layer: SharedSpec, block_size: int) -> SharedLayout:
        """Lay out pages of `block_size` tokens.

        Raises:
            ValueError: block_size is not a positive multiple of 16.
        """
        if block_size <= 0 or block_size % PART_ALIGNMENT:
            raise ValueError(
                f"block size is {block_size}; compressed pages need a positive multiple of {PART_ALIGNMENT}"
            )
        k, end = _side(layer.k, layer.k_records, block_size, 0)
        v, end = _side(layer.v, 1, block_size, end)
        assert end == block_size * layer.bytes_per_token
        return cls(k, v, end)


def _side(spec: SideSpec, records: int, block_size: int, start: int) -> tuple[SideLayout, int]:
    """A side's layout from byte `start`, and where it ends."""
    gains = records * block_size * GAIN_BYTES if spec.has_gain else 0
    codes = start + gains
    layout = SideLayout(records, block_size, spec.code_bytes, start if gains else -1, codes)
    return layout, codes + records * block_size * spec.code_bytes
