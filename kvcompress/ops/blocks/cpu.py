"""The CPU kernels on pages of form `blocks`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvcompress.codec.blocks.codec import BlocksCodec
from kvcompress.codec.blocks.spec import BlocksSpec
from kvcompress.codec.codes.registry import CODES
from kvcompress.ops import interface, library
from kvcompress.ops.blocks.plan import rings_struct
from kvcompress.ops.blocks.reference import BlocksOp
from kvcompress.ops.heads.reference import SPLIT_TOKENS
from kvcompress.ops.rows import Numbers, int32_rows, rows_struct

_TILE = 16
"""Tokens whose codes the kernels unpack together."""


def covers(spec: BlocksSpec) -> bool:
    """Whether the kernels know this layer's shape and codes."""
    codes = all("cpu" in CODES[side.bits].kernels for side in (spec.k, spec.v))
    keys = spec.k.along == "tokens" and (spec.k.group % _TILE == 0 or spec.k.group >= spec.block)
    values = spec.v.along == "channels" and (spec.v.group % 8 == 0 or spec.v.group >= spec.v.rank)
    low_rank = max(spec.k.low_rank, spec.v.low_rank) <= interface.MAX_LOW_RANK
    heads = spec.head_dim <= interface.MAX_HEAD_DIM and spec.head_dim % 8 == 0
    return codes and keys and values and low_rank and heads


class CpuBlocks(BlocksOp):
    """Attention by compiled code; what a step stores is torch's."""

    def __init__(self, compiled: ctypes.CDLL, codec: BlocksCodec) -> None:
        super().__init__(codec)
        self._compiled = compiled

    def attend(
        self,
        output_THD: Tensor,
        query_THD: Tensor,
        keys_THD: Tensor,
        values_THD: Tensor,
        pages_NHMB: Tensor,
        rings_NHXPD: Tensor,
        ring_R: Numbers,
        block_table_RN: Tensor,
        query_starts: Numbers,
        seq_lens: Numbers,
        softmax_scale: float,
        lse_TH: Tensor | None = None,
        split_tokens: int = SPLIT_TOKENS,
        max_query_len: int | None = None,
    ) -> None:
        spec, codec = self.plan.spec, self.plan.codec
        assert pages_NHMB.dtype == torch.uint8
        assert pages_NHMB.stride()[2:] == (spec.record_bytes, 1), pages_NHMB.stride()
        assert lse_TH is None or (lse_TH.dtype == torch.float32 and lse_TH.is_contiguous())
        # A column of an engine's block table is one way to say which rings: its numbers are not side by side.
        numbers = (ring_R, query_starts, seq_lens)
        rings_R, starts_R, lengths_R = (int32_rows(each) for each in numbers)
        requests = lengths_R.shape[0]
        assert starts_R.shape[0] == requests + 1
        assert rings_R.shape[0] == requests
        table_RN = int32_rows(block_table_RN)
        assert table_RN.shape[0] >= requests
        args = interface.BlockAttendArgs(
            pages=self.plan.pages_struct(pages_NHMB),
            rings=rings_struct(rings_NHXPD),
            query=rows_struct(query_THD),
            keys=rows_struct(keys_THD),
            values=rows_struct(values_THD),
            output=rows_struct(output_THD),
            lse_TH=None if lse_TH is None else lse_TH.data_ptr(),
            k_decode_HDR=self.plan.k_decode_HDR.data_ptr(),
            k_mean_HD=codec.k.mean_HD.data_ptr(),
            v_decode_HRD=codec.v.decode_HRD.data_ptr(),
            v_mean_HD=codec.v.mean_HD.data_ptr(),
            ring_of=rings_R.data_ptr(),
            block_table=table_RN.data_ptr(),
            block_table_stride=table_RN.stride(0) if requests > 1 else table_RN.shape[1],
            query_starts=starts_R.data_ptr(),
            seq_lens=lengths_R.data_ptr(),
            num_requests=requests,
            num_heads=query_THD.shape[1],
            softmax_scale=softmax_scale,
            split_tokens=-(-split_tokens // spec.block) * spec.block,
            threads=torch.get_num_threads(),
            level=library.level(),
        )
        library.check(self._compiled.kvc_attend_blocks(ctypes.byref(args)))
