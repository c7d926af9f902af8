"""The CPU kernels on pages of form `latent`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvcompress.ops import interface, library
from kvcompress.ops.call import Call, table_stride
from kvcompress.ops.latent.plan import latent_pages_struct
from kvcompress.ops.latent.reference import LatentOp
from kvcompress.ops.rows import DTYPES, rows_struct


def covers(channels: int, dtype: torch.dtype) -> bool:
    """Whether the kernels know such latents."""
    return dtype in DTYPES and channels <= interface.MAX_LATENT_CHANNELS


class CpuLatent(LatentOp):
    """Storing and attending by compiled code."""

    split_tokens = 1024
    """Tokens one thread attends at a time, a multiple of 64: few, because all heads are one piece of work."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        self._compiled = compiled

    def append(self, pages_NSC: Tensor, key_TC: Tensor, slots_T: Tensor) -> None:
        assert key_TC.shape[0] == slots_T.shape[0]
        slots_T = slots_T.to(torch.int64).contiguous()
        args = interface.LatentAppendArgs(
            pages=latent_pages_struct(pages_NSC),
            keys=rows_struct(key_TC[:, None]),
            slots=slots_T.data_ptr(),
            num_tokens=slots_T.shape[0],
            level=library.level(),
        )
        library.check(self._compiled.kvc_latent_append(ctypes.byref(args)))

    def attend(self, call: Call, pages_NSC: Tensor) -> None:
        table_RN, starts_R, lengths_R = call.numbers()
        assert call.query_THD.shape[2] == pages_NSC.shape[2]
        args = interface.LatentAttendArgs(
            pages=latent_pages_struct(pages_NSC),
            query=rows_struct(call.query_THD),
            output=rows_struct(call.output_THD),
            block_table=table_RN.data_ptr(),
            block_table_stride=table_stride(table_RN[: len(lengths_R)]),
            query_starts=starts_R.data_ptr(),
            seq_lens=lengths_R.data_ptr(),
            num_requests=len(lengths_R),
            num_heads=call.query_THD.shape[1],
            rank=call.output_THD.shape[2],
            softmax_scale=call.softmax_scale,
            split_tokens=self.split_tokens,
            threads=torch.get_num_threads(),
            level=library.level(),
        )
        library.check(self._compiled.kvc_latent_attend(ctypes.byref(args)))
