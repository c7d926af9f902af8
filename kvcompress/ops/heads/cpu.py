"""The CPU kernels on pages of form `heads`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.ops import library
from kvcompress.ops.call import Call
from kvcompress.ops.heads.reference import HeadsOp
from kvcompress.ops.interface.common import MAX_HEAD_DIM
from kvcompress.ops.interface.heads import AppendArgs, AttendArgs
from kvcompress.ops.rows import rows_struct


def covers(layer: HeadsSpec) -> bool:
    """Whether the kernels know this layer's shape and codes."""
    codes = layer.k.unpacked_by("cpu") and layer.v.unpacked_by("cpu")
    return codes and layer.head_dim <= MAX_HEAD_DIM and layer.head_dim % 8 == 0


class CpuHeads(HeadsOp):
    """Storing and attending by compiled code; reading pages back is torch's."""

    split_tokens = 4096
    """Tokens one thread attends at a time, a multiple of 64. Fixed positions, so that a result depends on nothing but
    its own tokens."""

    def __init__(self, compiled: ctypes.CDLL, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._compiled, (k, v) = compiled, (self.plan.codec.k, self.plan.codec.v)
        # What never changes.
        self._append = AppendArgs(k=self.plan.encoders[0], v=self.plan.encoders[1])
        self._attend = AttendArgs(
            k_decode_HDR=self.plan.k_decode_HDR, k_mean_HD=k.mean_HD, v_decode_HRD=v.decode_HRD, v_mean_HD=v.mean_HD
        )

    def append(self, pages_NHX: Tensor, keys_THD: Tensor, values_THD: Tensor, slots_T: Tensor) -> None:
        assert keys_THD.shape == values_THD.shape
        assert keys_THD.shape[0] == slots_T.shape[0]
        slots_T = slots_T.to(torch.int64).contiguous()
        args = self._append.filled(
            pages=self.plan.pages_struct(pages_NHX, self.order),
            keys=rows_struct(keys_THD),
            values=rows_struct(values_THD),
            slots=slots_T,
            num_tokens=slots_T.shape[0],
            run=library.run(),
        )
        library.check(self._compiled.kvc_heads_append(ctypes.byref(args)))

    def attend(self, call: Call, pages_NHX: Tensor) -> None:
        args = self._attend.filled(
            pages=self.plan.pages_struct(pages_NHX, self.order),
            query=rows_struct(call.query_THD),
            output=rows_struct(call.output_THD),
            lse_TH=call.lse_TH,
            batch=call.batch(),
            run=library.run(self.split_tokens),
        )
        library.check(self._compiled.kvc_heads_attend(ctypes.byref(args)))
