"""The CPU kernels on pages of form `blocks`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvcompress.codec.blocks.codec import BlocksCodec
from kvcompress.codec.blocks.spec import BlocksSpec
from kvcompress.codec.codes.registry import CODES
from kvcompress.ops import library
from kvcompress.ops.blocks.plan import rings_struct
from kvcompress.ops.blocks.reference import BlocksOp
from kvcompress.ops.call import Call
from kvcompress.ops.interface.blocks import MAX_LOW_RANK, AttendArgs
from kvcompress.ops.interface.common import MAX_HEAD_DIM
from kvcompress.ops.rows import Numbers, int32_rows, rows_struct

_TILE = 16
"""Tokens whose codes the kernels unpack together."""


def covers(spec: BlocksSpec) -> bool:
    """Whether the kernels know this layer's shape and codes."""
    codes = all("cpu" in CODES[side.bits].kernels for side in (spec.k, spec.v))
    keys = spec.k.along == "tokens" and (spec.k.group % _TILE == 0 or spec.k.group >= spec.block)
    values = spec.v.along == "channels" and (spec.v.group % 8 == 0 or spec.v.group >= spec.v.rank)
    low_rank = max(spec.k.low_rank, spec.v.low_rank) <= MAX_LOW_RANK
    heads = spec.head_dim <= MAX_HEAD_DIM and spec.head_dim % 8 == 0
    return codes and keys and values and low_rank and heads


class CpuBlocks(BlocksOp):
    """Attention by compiled code; what a step stores is torch's."""

    split_tokens = 4096
    """Tokens one thread attends at a time, rounded up to whole blocks."""

    def __init__(self, compiled: ctypes.CDLL, codec: BlocksCodec) -> None:
        super().__init__(codec)
        self._compiled, (k, v) = compiled, (self.plan.codec.k, self.plan.codec.v)
        # What never changes.
        self._attend = AttendArgs(
            k_decode_HDR=self.plan.k_decode_HDR, k_mean_HD=k.mean_HD, v_decode_HRD=v.decode_HRD, v_mean_HD=v.mean_HD
        )

    def attend(
        self, call: Call, keys_THD: Tensor, values_THD: Tensor, pages_NHMB: Tensor, rings_NHXPD: Tensor, ring_R: Numbers
    ) -> None:
        spec = self.plan.spec
        assert pages_NHMB.dtype == torch.uint8
        assert pages_NHMB.stride()[2:] == (spec.record_bytes, 1), pages_NHMB.stride()
        batch = call.batch()
        # A column of an engine's block table is one way to say which rings: its numbers are not side by side.
        rings_R = int32_rows(ring_R)
        assert len(rings_R) == batch.num_requests
        args = self._attend.filled(
            pages=self.plan.pages_struct(pages_NHMB),
            rings=rings_struct(rings_NHXPD),
            query=rows_struct(call.query_THD),
            keys=rows_struct(keys_THD),
            values=rows_struct(values_THD),
            output=rows_struct(call.output_THD),
            lse_TH=call.lse_TH,
            ring_of=rings_R,
            batch=batch,
            run=library.run(-(-self.split_tokens // spec.block) * spec.block),
        )
        library.check(self._compiled.kvc_blocks_attend(ctypes.byref(args)))
