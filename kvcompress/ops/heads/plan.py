"""What kernels need of one layer's codec of form `heads`, prepared once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcompress.codec.heads.codec import HeadsCodec, SideCodec
from kvcompress.codec.heads.layout import PageLayout
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.ops.interface.heads import Encoder, Pages
from kvcompress.ops.sides import side_struct


@dataclass(frozen=True)
class HeadsPlan:
    """One layer, ready for kernels: contiguous float32 matrices, and tables of bands and offsets."""

    codec: HeadsCodec
    spec: HeadsSpec = field(init=False)
    k_decode_HDR: Tensor = field(init=False, repr=False)
    """decode_HRD transposed: absorbing a query adds up its rows."""
    token_bytes: int = field(init=False)
    """Of one head."""
    _layouts: dict[tuple[int, str], PageLayout] = field(init=False, repr=False, default_factory=dict)
    _pages: dict[PageLayout, Pages] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "codec", self.codec.to(self.codec.k.mean_HD.device))
        object.__setattr__(self, "spec", self.codec.spec)
        object.__setattr__(self, "token_bytes", self.spec.k.bytes_per_token + self.spec.v.bytes_per_token)
        object.__setattr__(self, "k_decode_HDR", self.codec.k.decode_HRD.mT.contiguous())

    def layout(self, pages_NHX: Tensor, order: str) -> PageLayout:
        """Of pages `uint8 [num_blocks, num_kv_heads, record_bytes]`: their size says how many tokens they hold."""
        block_size = pages_NHX.shape[2] // self.token_bytes
        if (block_size, order) not in self._layouts:
            self._layouts[block_size, order] = PageLayout.of(self.spec, block_size, order)
        return self._layouts[block_size, order]

    def pages_struct(self, pages_NHX: Tensor, layout: PageLayout) -> Pages:
        """The C description of a cache; the part that depends on the layout alone is made once."""
        assert pages_NHX.dtype == torch.uint8, pages_NHX.dtype
        assert pages_NHX.shape[1:] == (layout.num_kv_heads, layout.record_bytes), (pages_NHX.shape, layout)
        assert pages_NHX.stride(2) == 1
        if layout not in self._pages:
            struct = Pages()
            struct.block_size = layout.block_size
            struct.num_kv_heads, struct.head_dim = self.spec.num_kv_heads, self.spec.head_dim
            struct.k = side_struct(self.spec.k, layout.k)
            struct.v = side_struct(self.spec.v, layout.v)
            self._pages[layout] = struct
        struct = Pages.from_buffer_copy(self._pages[layout])
        struct.point("data", pages_NHX)
        struct.num_blocks = pages_NHX.shape[0]
        struct.block_stride, struct.head_stride = pages_NHX.stride(0), pages_NHX.stride(1)
        return struct


def encoder_struct(side: SideCodec) -> Encoder:
    return Encoder(side.mean_HD, side.encode_HDR, side.weight_HR)
