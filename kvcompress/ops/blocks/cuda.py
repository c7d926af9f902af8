"""The CUDA kernels on pages of form `blocks`.

As for pages of single tokens (`ops.heads.cuda`), queries are absorbed and outputs expanded by torch, and nothing here
waits for the device or reads from it. Pages hold the same bytes as for the CPU.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvcompress.codec.blocks.codec import BlocksCodec
from kvcompress.codec.blocks.spec import BlockSide, BlocksSpec
from kvcompress.codec.layout import CHUNK_TOKENS
from kvcompress.ops import cuda_library, gpu
from kvcompress.ops.blocks.plan import rings_struct
from kvcompress.ops.blocks.reference import BlocksOp
from kvcompress.ops.call import Call
from kvcompress.ops.interface.blocks import (
    CUDA_MAX_HEAD_DIM,
    CUDA_MAX_LOW_RANK,
    CUDA_MAX_RANK,
    CUDA_WIDTHS,
    KeepArgs,
    NewestArgs,
)
from kvcompress.ops.rows import Numbers, batch_struct, int32_rows, rows_struct

_COLUMN = 64
"""Channels that share a token's scale, or more."""

_VECTOR = 16
"""Bytes that the kernels load at a time."""


def covers(spec: BlocksSpec) -> bool:
    """Whether there is a kernel for this layer.

    Blocks are of 64 tokens that share their keys' scales, ranks multiples of 16, residuals of even rank, and values
    change their scale between columns of 64 channels or not at all.
    """
    sides = (spec.k, spec.v)
    known = all(side.rank <= CUDA_MAX_RANK and side.rank % 16 == 0 for side in sides)
    known = known and all(side.low_rank <= CUDA_MAX_LOW_RANK and side.low_rank % 2 == 0 for side in sides)
    known = known and (spec.k.bits, spec.v.bits) in CUDA_WIDTHS
    heads = spec.head_dim <= CUDA_MAX_HEAD_DIM and spec.head_dim % 8 == 0
    return known and heads and spec.block == CHUNK_TOKENS and _groups_known(spec.k, spec.v)


def _groups_known(k: BlockSide, v: BlockSide) -> bool:
    keys = k.along == "tokens" and k.group >= k.block
    return keys and v.along == "channels" and (v.group >= v.rank or v.group % _COLUMN == 0)


class CudaBlocks(BlocksOp):
    """Attention of a few queries per request and keeping their tokens by kernels; sealing and prompts are torch's."""

    on_kernels = True

    def __init__(self, kernels: ctypes.CDLL, codec: BlocksCodec) -> None:
        super().__init__(codec)
        self._kernels = kernels

    def attend(
        self,
        call: Call,
        keys_THD: Tensor,
        values_THD: Tensor,
        pages_NHMB: Tensor,
        rings_NHXPD: Tensor,
        ring_R: Numbers,
        splits: int | None = None,
    ) -> None:
        """By torch: more queries of a request than `gpu.MOST_QUERIES`, or pages of other than a power of two blocks.

        Args:
            splits: parts a request's blocks are cut into; chosen from shapes alone if not given.
        """
        per_page = pages_NHMB.shape[2]
        if call.most_queries > gpu.MOST_QUERIES or per_page & (per_page - 1):
            super().attend(call, keys_THD, values_THD, pages_NHMB, rings_NHXPD, ring_R)
            return
        heads = self.plan.spec.num_kv_heads
        grouped_THGD = call.query_THD.float().unflatten(1, (heads, -1))
        absorbed_THGR = torch.einsum("thgd,hdr->thgr", grouped_THGD, self.plan.k_decode_HDR)
        absorbed_THR = absorbed_THGR.flatten(1, 2).contiguous()
        mixed_THR, sealed_TH = self.attend_blocks(call, absorbed_THR, pages_NHMB, splits)
        mixed_THGR = mixed_THR.unflatten(1, (heads, -1))
        sealed_THD = torch.einsum("thgr,hrd->thgd", mixed_THGR, self.plan.codec.v.decode_HRD).flatten(1, 2).contiguous()
        self.attend_newest(call, sealed_THD, sealed_TH, keys_THD, values_THD, rings_NHXPD, ring_R)

    def attend_blocks(
        self, call: Call, absorbed_THR: Tensor, pages_NHMB: Tensor, splits: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Absorbed queries on complete blocks alone: mixed latents `[tokens, query heads, v rank]` and lse, without the
        means' shares."""
        spec = self.plan.spec
        pages = self.plan.pages_struct(pages_NHMB)
        shape = (spec.num_kv_heads, pages_NHMB.shape[2] * spec.block, spec.v.rank)
        kernel = self._kernels.kvc_cuda_blocks_attend
        return gpu.attend_latents(self._kernels, kernel, pages, call, absorbed_THR, shape, splits)

    def attend_newest(
        self,
        call: Call,
        sealed_THD: Tensor,
        sealed_TH: Tensor,
        keys_THD: Tensor,
        values_THD: Tensor,
        rings_NHXPD: Tensor,
        ring_R: Numbers,
    ) -> None:
        """Attention on the tokens after each query's complete blocks, and the two merged."""
        spec, device = self.plan.spec, call.query_THD.device
        assert sealed_THD.is_contiguous()
        keys_THD, values_THD = (_aligned(rows) for rows in (keys_THD, values_THD))
        args = NewestArgs(
            rings=rings_struct(rings_NHXPD),
            query=rows_struct(call.query_THD),
            keys=rows_struct(keys_THD),
            values=rows_struct(values_THD),
            output=rows_struct(call.output_THD),
            sealed_THD=sealed_THD,
            sealed_lse_TH=sealed_TH,
            lse_TH=call.lse_TH,
            k_mean_HD=self.plan.codec.k.mean_HD,
            v_mean_HD=self.plan.codec.v.mean_HD,
            ring_of=int32_rows(ring_R, device),
            batch=call.batch(device),
            run=gpu.run(device, call.query_THD.shape[0], max_query_len=call.most_queries),
            block=spec.block,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
        )
        cuda_library.check(self._kernels, self._kernels.kvc_cuda_blocks_attend_newest(ctypes.byref(args)))

    def keep(self, call: Call, keys_THD: Tensor, values_THD: Tensor, rings_NHXPD: Tensor, ring_R: Tensor) -> None:
        numbers = (ring_R, call.query_starts, call.seq_lens)
        rings_R, starts_R, lengths_R = (int32_rows(each, keys_THD.device) for each in numbers)
        args = KeepArgs(
            rings=rings_struct(rings_NHXPD),
            keys=rows_struct(keys_THD),
            values=rows_struct(values_THD),
            ring_of=rings_R,
            batch=batch_struct(starts_R, lengths_R),
            run=gpu.run(keys_THD.device, keys_THD.shape[0]),
            num_kv_heads=keys_THD.shape[1],
            head_dim=keys_THD.shape[2],
        )
        cuda_library.check(self._kernels, self._kernels.kvc_cuda_blocks_keep(ctypes.byref(args)))

    def workspace_bytes(self, tokens: int, num_heads: int, longest: int) -> int:
        spec, device = self.plan.spec, self.plan.codec.k.mean_HD.device
        kernels = gpu.workspace_bytes(spec.head_dim, spec.k.rank, spec.v.rank, tokens, num_heads, device)
        return max(super().workspace_bytes(tokens, num_heads, longest), kernels)


def _aligned(rows_THD: Tensor) -> Tensor:
    """The same rows where the kernels can load whole vectors; a projection's always are there."""
    entries = _VECTOR // rows_THD.element_size()
    whole = rows_THD.data_ptr() % _VECTOR == 0 and all(stride % entries == 0 for stride in rows_THD.stride()[:2])
    return rows_THD if whole else rows_THD.clone(memory_format=torch.contiguous_format)
