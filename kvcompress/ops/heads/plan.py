"""What kernels need of one layer's codec of form `heads`, prepared once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
    encoders: tuple[Encoder, Encoder] = field(init=False, repr=False)
    """Of keys and values."""
    token_bytes: int = field(init=False)
    """Of one head."""
    _layouts: dict[tuple[int, str], tuple[PageLayout, Pages]] = field(init=False, repr=False, default_factory=dict)
    _last: dict[str, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "codec", self.codec.to(self.codec.k.mean_HD.device))
        object.__setattr__(self, "spec", self.codec.spec)
        object.__setattr__(self, "token_bytes", self.spec.k.bytes_per_token + self.spec.v.bytes_per_token)
        object.__setattr__(self, "encoders", tuple(map(_encoder_struct, (self.codec.k, self.codec.v))))
        object.__setattr__(self, "k_decode_HDR", self.codec.k.decode_HRD.mT.contiguous())

    def layout(self, pages_NHX: Tensor, order: str) -> PageLayout:
        """Of pages `uint8 [num_blocks, num_kv_heads, record_bytes]`: their size says how many tokens they hold."""
        return self._described(pages_NHX, order)[0]

    def pages_struct(self, pages_NHX: Tensor, order: str) -> Pages:
        """The C description of a cache, made again where the last call's was another."""
        asked = (pages_NHX.data_ptr(), pages_NHX.shape, pages_NHX.stride(), order)
        if self._last.get("asked") != asked:
            layout, described = self._described(pages_NHX, order)
            assert pages_NHX.dtype == torch.uint8, pages_NHX.dtype
            assert pages_NHX.shape[1:] == (layout.num_kv_heads, layout.record_bytes), (pages_NHX.shape, layout)
            strides = pages_NHX.stride()
            assert strides[2] == 1
            numbers = {"num_blocks": pages_NHX.shape[0], "block_stride": strides[0], "head_stride": strides[1]}
            # Whoever calls keeps the pages; we do not keep memory that an engine gives back.
            self._last["struct"] = described.filled(data=pages_NHX.data_ptr(), **numbers)
            self._last["asked"] = asked
        struct: Pages = self._last["struct"]
        return struct

    def _described(self, pages_NHX: Tensor, order: str) -> tuple[PageLayout, Pages]:
        """What depends on the size and order of pages alone, made once."""
        key = pages_NHX.shape[2], order
        if key not in self._layouts:
            layout = PageLayout.of(self.spec, key[0] // self.token_bytes, order)
            struct = Pages(block_size=layout.block_size)
            struct.num_kv_heads, struct.head_dim = self.spec.num_kv_heads, self.spec.head_dim
            struct.k, struct.v = side_struct(self.spec.k, layout.k), side_struct(self.spec.v, layout.v)
            self._layouts[key] = layout, struct
        return self._layouts[key]


def _encoder_struct(side: SideCodec) -> Encoder:
    return Encoder(side.mean_HD, side.encode_HDR, side.weight_HR)
