"""The CPU kernels on pages of form `latent`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvcompress.ops import interface, library
from kvcompress.ops.latent.plan import latent_pages_struct
from kvcompress.ops.latent.reference import SPLIT_TOKENS, LatentOp
from kvcompress.ops.rows import DTYPES, Numbers, int32_rows, rows_struct


def covers(channels: int, dtype: torch.dtype) -> bool:
    """Whether the kernels know such latents."""
    return dtype in DTYPES and channels <= interface.MAX_LATENT_CHANNELS


class CpuLatent(LatentOp):
    """Storing and attending by compiled code."""

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

    def attend(
        self,
        output_THR: Tensor,
        query_THC: Tensor,
        pages_NSC: Tensor,
        block_table_RN: Tensor,
        query_starts: Numbers,
        seq_lens: Numbers,
        softmax_scale: float,
        split_tokens: int = SPLIT_TOKENS,
        max_query_len: int | None = None,
    ) -> None:
        table_RN, starts_R, lengths_R = int32_rows(block_table_RN), int32_rows(query_starts), int32_rows(seq_lens)
        requests = lengths_R.shape[0]
        assert starts_R.shape[0] == requests + 1
        assert table_RN.shape[0] >= requests
        assert query_THC.shape[2] == pages_NSC.shape[2]
        args = interface.LatentAttendArgs(
            pages=latent_pages_struct(pages_NSC),
            query=rows_struct(query_THC),
            output=rows_struct(output_THR),
            block_table=table_RN.data_ptr(),
            block_table_stride=table_RN.stride(0) if requests > 1 else table_RN.shape[1],
            query_starts=starts_R.data_ptr(),
            seq_lens=lengths_R.data_ptr(),
            num_requests=requests,
            num_heads=query_THC.shape[1],
            rank=output_THR.shape[2],
            softmax_scale=softmax_scale,
            split_tokens=split_tokens,
            threads=torch.get_num_threads(),
            level=library.level(),
        )
        library.check(self._compiled.kvc_latent_attend(ctypes.byref(args)))
