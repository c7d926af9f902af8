"""The CPU kernels on pages of form `heads`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.ops import interface, library
from kvcompress.ops.call import Call, table_stride
from kvcompress.ops.heads.reference import HeadsOp
from kvcompress.ops.rows import rows_struct


def covers(layer: HeadsSpec) -> bool:
    """Whether the kernels know this layer's shape and codes."""
    codes = layer.k.unpacked_by("cpu") and layer.v.unpacked_by("cpu")
    return codes and layer.head_dim <= interface.MAX_HEAD_DIM and layer.head_dim % 8 == 0


class CpuHeads(HeadsOp):
    """Storing and attending by compiled code; reading pages back is torch's."""

    split_tokens = 4096
    """Tokens one thread attends at a time, a multiple of 64. Fixed positions, so that a result depends on nothing but
    its own tokens."""

    def __init__(self, compiled: ctypes.CDLL, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._compiled = compiled

    def append(self, pages_NHX: Tensor, keys_THD: Tensor, values_THD: Tensor, slots_T: Tensor) -> None:
        assert keys_THD.shape == values_THD.shape
        assert keys_THD.shape[0] == slots_T.shape[0]
        k, v = self.plan.codec.k, self.plan.codec.v
        slots_T = slots_T.to(torch.int64).contiguous()
        args = interface.AppendArgs(
            pages=self.plan.pages_struct(pages_NHX, self.layout(pages_NHX)),
            keys=rows_struct(keys_THD),
            values=rows_struct(values_THD),
            slots=slots_T.data_ptr(),
            num_tokens=slots_T.shape[0],
            k_mean_HD=k.mean_HD.data_ptr(),
            k_encode_HDR=k.encode_HDR.data_ptr(),
            k_weight_HR=k.weight_HR.data_ptr(),
            v_mean_HD=v.mean_HD.data_ptr(),
            v_encode_HDR=v.encode_HDR.data_ptr(),
            v_weight_HR=v.weight_HR.data_ptr(),
            threads=torch.get_num_threads(),
            level=library.level(),
        )
        library.check(self._compiled.kvc_append(ctypes.byref(args)))

    def attend(self, call: Call, pages_NHX: Tensor) -> None:
        k, v = self.plan.codec.k, self.plan.codec.v
        table_RN, starts_R, lengths_R = call.numbers()
        args = interface.AttendArgs(
            pages=self.plan.pages_struct(pages_NHX, self.layout(pages_NHX)),
            query=rows_struct(call.query_THD),
            output=rows_struct(call.output_THD),
            lse_TH=None if call.lse_TH is None else call.lse_TH.data_ptr(),
            k_decode_HDR=self.plan.k_decode_HDR.data_ptr(),
            k_mean_HD=k.mean_HD.data_ptr(),
            v_decode_HRD=v.decode_HRD.data_ptr(),
            v_mean_HD=v.mean_HD.data_ptr(),
            block_table=table_RN.data_ptr(),
            block_table_stride=table_stride(table_RN[: len(lengths_R)]),
            query_starts=starts_R.data_ptr(),
            seq_lens=lengths_R.data_ptr(),
            num_requests=len(lengths_R),
            num_heads=call.query_THD.shape[1],
            softmax_scale=call.softmax_scale,
            split_tokens=self.split_tokens,
            threads=torch.get_num_threads(),
            level=library.level(),
        )
        library.check(self._compiled.kvc_attend(ctypes.byref(args)))
