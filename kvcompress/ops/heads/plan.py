"""What the kernels need of one layer's codec: contiguous float32 matrices and tables of bands and offsets.

Prepared once per layer. A codec (`codec.layer.HeadsCodec`) is seen through protocols here, because this package lies
below the codec's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kvcompress.codec.bands import Band, SideSpec
from kvcompress.codec.heads.layout import TOKEN_MAJOR, PageLayout
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.ops import interface
from kvcompress.ops.sides import side_struct


class SideTensors(Protocol):
    """Keys or values of one layer, as `codec.layer.SideCodec` has them."""

    @property
    def spec(self) -> SideSpec: ...
    @property
    def mean_HD(self) -> Tensor: ...
    @property
    def encode_HDR(self) -> Tensor: ...
    @property
    def decode_HRD(self) -> Tensor: ...
    @property
    def weight_HR(self) -> Tensor: ...


class LayerTensors(Protocol):
    """Both sides of one layer, as `codec.layer.HeadsCodec` has them."""

    @property
    def k(self) -> SideTensors: ...
    @property
    def v(self) -> SideTensors: ...


@dataclass(frozen=True)
class SidePlan:
    """Keys or values of one layer: contiguous float32 tensors."""

    spec: SideSpec
    mean_HD: Tensor
    encode_HDR: Tensor
    decode_HRD: Tensor
    weight_HR: Tensor

    @classmethod
    def of(cls, side: SideTensors) -> SidePlan:
        tensors = (side.mean_HD, side.encode_HDR, side.decode_HRD, side.weight_HR)
        return cls(side.spec, *(tensor.float().contiguous() for tensor in tensors))


@dataclass(frozen=True)
class HeadsPlan:
    """One layer, ready for `append` and `decode_attention`."""

    k: SidePlan
    v: SidePlan
    k_decode_HDR: Tensor = field(init=False, repr=False)
    """decode_HRD transposed: absorbing a query adds up its rows."""
    _pages: dict[PageLayout, interface.Pages] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "k_decode_HDR", self.k.decode_HRD.mT.contiguous())

    @classmethod
    def of(cls, codec: LayerTensors) -> HeadsPlan:
        return cls(SidePlan.of(codec.k), SidePlan.of(codec.v))

    @property
    def spec(self) -> HeadsSpec:
        heads, head_dim = self.k.mean_HD.shape
        return HeadsSpec(heads, head_dim, self.k.spec, self.v.spec)

    @property
    def device(self) -> torch.device:
        return self.k.mean_HD.device

    def covered(self, layout: PageLayout, pages_NHX: Tensor) -> bool:
        """Whether the CPU kernels know this layer's shape and pages."""
        head_dim = self.k.mean_HD.shape[1]
        known = head_dim <= interface.MAX_HEAD_DIM and head_dim % 8 == 0
        return known and layout.order == TOKEN_MAJOR and pages_NHX.device.type == "cpu"

    def pages_struct(self, pages_NHX: Tensor, layout: PageLayout) -> interface.Pages:
        """The C description of a cache; the part that depends on the layout alone is made once."""
        assert pages_NHX.dtype == torch.uint8, pages_NHX.dtype
        assert pages_NHX.shape[1:] == (layout.num_kv_heads, layout.record_bytes), (pages_NHX.shape, layout)
        assert pages_NHX.stride(2) == 1
        if layout not in self._pages:
            struct = interface.Pages()
            struct.block_size = layout.block_size
            struct.num_kv_heads, struct.head_dim = self.k.mean_HD.shape
            struct.k = side_struct(self.k.spec, layout.k)
            struct.v = side_struct(self.v.spec, layout.v)
            self._pages[layout] = struct
        struct = interface.Pages.from_buffer_copy(self._pages[layout])
        struct.data = pages_NHX.data_ptr()
        struct.num_blocks = pages_NHX.shape[0]
        struct.block_stride, struct.head_stride = pages_NHX.stride(0), pages_NHX.stride(1)
        return struct

    def flatten(self) -> tuple[list[Tensor], list[int]]:
        """Tensors and numbers for a torch op, which takes no objects."""
        tensors: list[Tensor] = []
        numbers: list[int] = []
        for side in (self.k, self.v):
            tensors += [side.mean_HD, side.encode_HDR, side.decode_HRD, side.weight_HR]
            numbers += [side.spec.outliers, len(side.spec.bands)]
            for band in side.spec.bands:
                numbers += band
        return tensors, numbers

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor], numbers: Sequence[int]) -> HeadsPlan:
        """Inverse of `flatten`."""
        sides, position = [], 0
        for start in (0, 4):
            outliers, count = numbers[position : position + 2]
            flat = numbers[position + 2 : position + 2 + 2 * count]
            position += 2 + 2 * count
            bands = tuple(Band(bits, width) for bits, width in zip(flat[::2], flat[1::2], strict=True))
            sides.append(SidePlan(SideSpec(bands, outliers), *tensors[start : start + 4]))
        return cls(*sides)
