"""What the kernels need of one layer whose cache has the form `blocks`: matrices and the places of a record's parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields
from itertools import accumulate
from typing import TYPE_CHECKING, get_args

from torch import Tensor

from kvcompress.codec.blocks.spec import Axis, BlockSide, BlocksSpec
from kvcompress.ops import interface
from kvcompress.ops.rows import DTYPES

if TYPE_CHECKING:
    from kvcompress.codec.blocks.codec import BlocksCodec

_TENSORS = 4
"""Of each side: mean, basis, inverse, scale."""

_AXES: tuple[Axis, ...] = get_args(Axis)
_TILE = 16
"""Tokens whose codes the kernels unpack together."""


@dataclass(frozen=True)
class BlocksPlan:
    """One layer, ready for `blocks.attend`."""

    codec: BlocksCodec
    k_decode_HDR: Tensor = field(init=False, repr=False)
    """decode_HRD transposed: absorbing a query adds up its rows."""
    k_mean_HD: Tensor = field(init=False, repr=False)
    v_decode_HRD: Tensor = field(init=False, repr=False)
    v_mean_HD: Tensor = field(init=False, repr=False)
    _struct: interface.BlockPages = field(init=False, repr=False)

    def __post_init__(self) -> None:
        k, v, spec = self.codec.k, self.codec.v, self.codec.spec
        tensors = {
            "k_decode_HDR": k.decode_HRD.mT.contiguous(),
            "k_mean_HD": k.mean_HD.contiguous(),
            "v_decode_HRD": v.decode_HRD.contiguous(),
            "v_mean_HD": v.mean_HD.contiguous(),
        }
        for name, tensor in tensors.items():
            object.__setattr__(self, name, tensor)
        struct = interface.BlockPages()
        struct.record_bytes, struct.block = spec.record_bytes, spec.block
        struct.num_kv_heads, struct.head_dim = spec.num_kv_heads, spec.head_dim
        struct.k, struct.v = _side_struct(spec.k, 0), _side_struct(spec.v, spec.k.nbytes)
        object.__setattr__(self, "_struct", struct)

    @property
    def spec(self) -> BlocksSpec:
        return self.codec.spec

    def covered(self) -> bool:
        """Whether the compiled kernels know this layer's shape."""
        spec = self.spec
        keys = spec.k.along == "tokens" and (spec.k.group % _TILE == 0 or spec.k.group >= spec.block)
        values = spec.v.along == "channels" and (spec.v.group % 8 == 0 or spec.v.group >= spec.v.rank)
        low_rank = max(spec.k.low_rank, spec.v.low_rank) <= interface.MAX_LOW_RANK
        return keys and values and low_rank and spec.head_dim <= interface.MAX_HEAD_DIM and spec.head_dim % 8 == 0

    def pages_struct(self, pages_NHMB: Tensor) -> interface.BlockPages:
        """The C description of a cache."""
        struct = interface.BlockPages.from_buffer_copy(self._struct)
        struct.data, struct.num_blocks = pages_NHMB.data_ptr(), pages_NHMB.shape[0]
        struct.block_stride, struct.head_stride = pages_NHMB.stride(0), pages_NHMB.stride(1)
        struct.block_size = pages_NHMB.shape[2] * self.spec.block
        return struct

    def flatten(self) -> tuple[list[Tensor], list[int]]:
        """Tensors and numbers for a torch op, which takes no objects."""
        tensors: list[Tensor] = []
        numbers: list[int] = []
        for side in (self.codec.k, self.codec.v):
            tensors += side.tensors().values()
            numbers += [_AXES.index(value) if value in _AXES else value for value in astuple(side.spec)]
        return tensors, numbers

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor], numbers: Sequence[int]) -> BlocksPlan:
        """Inverse of `flatten`."""
        from kvcompress.codec.blocks.codec import BlocksCodec, BlockSideCodec

        names = [item.name for item in fields(BlockSide)]
        sides = []
        for index in range(2):
            values = dict(zip(names, numbers[index * len(names) : (index + 1) * len(names)], strict=True))
            spec = BlockSide(along=_AXES[values.pop("along")], **values)
            sides.append(BlockSideCodec(spec, *tensors[index * _TENSORS : (index + 1) * _TENSORS]))
        return cls(BlocksCodec(*sides))


def rings_struct(rings_NHXPD: Tensor) -> interface.Rings:
    """The C description of rings."""
    places, head_dim = rings_NHXPD.shape[3:]
    assert rings_NHXPD.stride()[2:] == (places * head_dim, head_dim, 1), rings_NHXPD.stride()
    numbers = (rings_NHXPD.shape[0], rings_NHXPD.stride(0), rings_NHXPD.stride(1), places, DTYPES[rings_NHXPD.dtype])
    return interface.Rings(rings_NHXPD.data_ptr(), *numbers)


def _side_struct(side: BlockSide, start: int) -> interface.BlockSide:
    struct = interface.BlockSide(side.rank, side.bits, side.group, side.low_rank, side.outliers, side.nbytes)
    offsets = accumulate(side.parts().values(), initial=start)
    names = ("code", "scale", "zero", "token", "channel", "value", "place")
    for name, offset in zip(names, offsets, strict=False):  # the last is the end
        setattr(struct, f"{name}_offset", offset)
    return struct
