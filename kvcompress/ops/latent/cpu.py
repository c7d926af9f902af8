"""The CPU kernels on pages of form `latent`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvcompress.ops import library
from kvcompress.ops.call import Call
from kvcompress.ops.interface.common import MAX_LATENT_CHANNELS
from kvcompress.ops.interface.latent import AppendArgs, AttendArgs
from kvcompress.ops.latent.plan import latent_pages_struct
from kvcompress.ops.latent.reference import LatentOp
from kvcompress.ops.rows import DTYPES, rows_struct


def covers(channels: int, dtype: torch.dtype) -> bool:
    """Whether the kernels know such latents."""
    return dtype in DTYPES and channels <= MAX_LATENT_CHANNELS


class CpuLatent(LatentOp):
    """Storing and attending by compiled code."""

    split_tokens = 1024
    """Tokens one thread attends at a time, a multiple of 64: few, because all heads are one piece of work."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        self._compiled = compiled

    def append(self, pages_NSC: Tensor, key_TC: Tensor, slots_T: Tensor) -> None:
        assert key_TC.shape[0] == slots_T.shape[0]
        slots_T = slots_T.to(torch.int64).contiguous()
        pages, keys = latent_pages_struct(pages_NSC), rows_struct(key_TC[:, None])
        args = AppendArgs.plain(slots_T, pages, keys, slots_T.data_ptr(), slots_T.shape[0], library.run())
        library.check(self._compiled.kvc_latent_append(ctypes.byref(args)))

    def attend(self, call: Call, pages_NSC: Tensor) -> None:
        assert call.query_THD.shape[2] == pages_NSC.shape[2]
        rows, batch = (rows_struct(call.query_THD), rows_struct(call.output_THD)), call.batch()
        pages, rank = latent_pages_struct(pages_NSC), call.output_THD.shape[2]
        args = AttendArgs.plain(batch, pages, *rows, batch, rank, library.run(self.split_tokens))
        library.check(self._compiled.kvc_latent_attend(ctypes.byref(args)))
