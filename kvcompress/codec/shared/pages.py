"""Cache pages of a layer that shares a latent: its stripes, and with share "v" the keys of its heads.

A page is `uint8 [page_bytes]`: for keys and then for values, `[records, block_size, bytes per token]`, where a stripe
is one record per token and keys with bases of their own are one per head. What a record holds is `record.Record`. A
slot is block * block_size + offset.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcompress.codec.bands import SideSpec
from kvcompress.codec.layout import PART_ALIGNMENT
from kvcompress.codec.record import Record
from kvcompress.codec.shared.spec import SharedSpec


@dataclass(frozen=True)
class SideLayout:
    """Where one side's records lie in a page."""

    records: int
    block_size: int
    spec: SideSpec
    offset: int

    def write(self, pages_NX: Tensor, encoded: Record, slots_T: Tensor) -> None:
        """Store encoded tokens in their slots. Slots below 0 are padding and are skipped."""
        valid_T = slots_T >= 0
        block_T, offset_T = slots_T[valid_T] // self.block_size, slots_T[valid_T] % self.block_size
        self.view(pages_NX)[block_T, :, offset_T] = encoded.to_bytes()[valid_T]

    def read(self, pages_NX: Tensor, blocks_N: Tensor, length: int) -> Record:
        """The first `length` tokens of a block table."""
        record_THX = self.view(pages_NX)[blocks_N].transpose(1, 2).flatten(0, 1)[:length]
        return Record.from_bytes(record_THX, self.spec)

    @property
    def end(self) -> int:
        return self.offset + self.records * self.block_size * self.spec.bytes_per_token

    def view(self, pages_NX: Tensor) -> Tensor:
        """`[num_blocks, records, block_size, bytes per token]`."""
        shape = (self.records, self.block_size, self.spec.bytes_per_token)
        view: Tensor = pages_NX[:, self.offset : self.end].unflatten(-1, shape)
        return view


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
        k = SideLayout(layer.k_records, block_size, layer.k, 0)
        v = SideLayout(1, block_size, layer.v, k.end)
        assert v.end == block_size * layer.bytes_per_token
        return cls(k, v, v.end)
