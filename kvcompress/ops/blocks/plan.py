"""What kernels need of one layer's codec of form `blocks`, prepared once: matrices, and where a record's parts lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

from torch import Tensor

from kvcompress.codec.blocks.codec import BlocksCodec
from kvcompress.codec.blocks.spec import BlockSide, BlocksSpec
from kvcompress.ops.interface.blocks import Pages, Rings, Side
from kvcompress.ops.rows import DTYPES


@dataclass(frozen=True)
class BlocksPlan:
    """One layer, ready for kernels."""

    codec: BlocksCodec
    spec: BlocksSpec = field(init=False)
    k_decode_HDR: Tensor = field(init=False, repr=False)
    """decode_HRD transposed: absorbing a query adds up its rows."""
    _struct: Pages = field(init=False, repr=False)

    def __post_init__(self) -> None:
        codec = self.codec.to(self.codec.k.mean_HD.device)
        spec = codec.spec
        struct = Pages()
        struct.record_bytes, struct.block = spec.record_bytes, spec.block
        struct.num_kv_heads, struct.head_dim = spec.num_kv_heads, spec.head_dim
        struct.k, struct.v = _side_struct(spec.k, 0), _side_struct(spec.v, spec.k.nbytes)
        k_decode_HDR = codec.k.decode_HRD.mT.contiguous()
        for name, value in (("codec", codec), ("spec", spec), ("k_decode_HDR", k_decode_HDR), ("_struct", struct)):
            object.__setattr__(self, name, value)

    def pages_struct(self, pages_NHMB: Tensor) -> Pages:
        """The C description of a cache."""
        return self._struct.filled(
            data=pages_NHMB,
            num_blocks=pages_NHMB.shape[0],
            block_stride=pages_NHMB.stride(0),
            head_stride=pages_NHMB.stride(1),
            block_size=pages_NHMB.shape[2] * self.spec.block,
        )


def rings_struct(rings_NHXPD: Tensor) -> Rings:
    """The C description of rings."""
    places, head_dim = rings_NHXPD.shape[3:]
    assert rings_NHXPD.stride()[2:] == (places * head_dim, head_dim, 1), rings_NHXPD.stride()
    numbers = (rings_NHXPD.shape[0], rings_NHXPD.stride(0), rings_NHXPD.stride(1), places, DTYPES[rings_NHXPD.dtype])
    return Rings(rings_NHXPD, *numbers)


def _side_struct(side: BlockSide, start: int) -> Side:
    struct = Side(side.rank, side.bits, side.group, side.low_rank, side.outliers, side.nbytes)
    offsets = accumulate(side.parts().values(), initial=start)
    names = ("code", "scale", "zero", "token", "channel", "value", "place")
    for name, offset in zip(names, offsets, strict=False):  # the last is the end
        setattr(struct, f"{name}_offset", offset)
    return struct
