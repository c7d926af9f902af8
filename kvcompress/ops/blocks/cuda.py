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
from kvcompress.codec.heads.layout import CHUNK_TOKENS
from kvcompress.ops import cuda_library, gpu, interface
from kvcompress.ops.blocks.plan import rings_struct
from kvcompress.ops.blocks.reference import BlocksOp
from kvcompress.ops.heads.reference import SPLIT_TOKENS
from kvcompress.ops.rows import Numbers, int32_rows, most_queries, rows_struct

MAX_RANK = 128
MAX_LOW_RANK = 8
MAX_HEAD_DIM = 256
BITS = ((8, 8), (4, 4), (4, 2), (2, 2))
"""Widths of keys and values."""

_COLUMN = 64
"""Channels that share a token's scale, or more."""

_VECTOR = 16
"""Bytes that the kernels load at a time."""


class BlockAttendArgs(ctypes.Structure):
    _fields_ = (
        ("pages", interface.BlockPages),
        ("query_THR", ctypes.c_void_p),
        ("output_THR", ctypes.c_void_p),
        ("lse_TH", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("query_starts", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("num_requests", ctypes.c_int32),
        ("max_query_len", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("softmax_scale", ctypes.c_float),
        ("stream", ctypes.c_void_p),
    )


class NewestArgs(ctypes.Structure):
    _fields_ = (
        ("rings", interface.Rings),
        ("query", interface.Rows),
        ("keys", interface.Rows),
        ("values", interface.Rows),
        ("output", interface.Rows),
        ("sealed_THD", ctypes.c_void_p),
        ("sealed_lse_TH", ctypes.c_void_p),
        ("lse_TH", ctypes.c_void_p),
        ("k_mean_HD", ctypes.c_void_p),
        ("v_mean_HD", ctypes.c_void_p),
        ("ring_of", ctypes.c_void_p),
        ("query_starts", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("block", ctypes.c_int32),
        ("num_requests", ctypes.c_int32),
        ("max_query_len", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("softmax_scale", ctypes.c_float),
        ("stream", ctypes.c_void_p),
    )


class KeepArgs(ctypes.Structure):
    _fields_ = (
        ("rings", interface.Rings),
        ("keys", interface.Rows),
        ("values", interface.Rows),
        ("ring_of", ctypes.c_void_p),
        ("query_starts", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("num_requests", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
    )


def covers(spec: BlocksSpec) -> bool:
    """Whether there is a kernel for this layer.

    Blocks are of 64 tokens that share their keys' scales, ranks multiples of 16, residuals of even rank, and values
    change their scale between columns of 64 channels or not at all.
    """
    sides = (spec.k, spec.v)
    known = all(side.rank <= MAX_RANK and side.rank % 16 == 0 for side in sides)
    known = known and all(side.low_rank <= MAX_LOW_RANK and side.low_rank % 2 == 0 for side in sides)
    known = known and (spec.k.bits, spec.v.bits) in BITS
    heads = spec.head_dim <= MAX_HEAD_DIM and spec.head_dim % 8 == 0
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
        splits: int | None = None,
    ) -> None:
        """By torch: more queries of a request than `gpu.MOST_QUERIES`, or pages of other than a power of two blocks.

        Args:
            splits: parts a request's blocks are cut into; chosen from shapes alone if not given.
        """
        most = most_queries(query_starts, query_THD.shape[0]) if max_query_len is None else max_query_len
        per_page, tokens = pages_NHMB.shape[2], (query_THD, keys_THD, values_THD)
        if most > gpu.MOST_QUERIES or per_page & (per_page - 1):
            caches, starts = (pages_NHMB, rings_NHXPD), query_starts
            super().attend(
                output_THD, *tokens, *caches, ring_R, block_table_RN, starts, seq_lens, softmax_scale, lse_TH
            )
            return
        rings_R, table_RN, starts_R, lengths_R = (
            int32_rows(each, query_THD.device) for each in (ring_R, block_table_RN, query_starts, seq_lens)
        )
        batch: tuple[Tensor, Tensor, float, int] = (starts_R, lengths_R, softmax_scale, most)
        grouped_THGD = query_THD.float().unflatten(1, (self.plan.spec.num_kv_heads, -1))
        absorbed_THGR = torch.einsum("thgd,hdr->thgr", grouped_THGD, self.plan.k_decode_HDR)
        absorbed_THR = absorbed_THGR.flatten(1, 2).contiguous()
        mixed_THR, sealed_TH = self.attend_blocks(absorbed_THR, pages_NHMB, table_RN, *batch, splits)
        mixed_THGR = mixed_THR.unflatten(1, (self.plan.spec.num_kv_heads, -1))
        sealed_THD = torch.einsum("thgr,hrd->thgd", mixed_THGR, self.plan.codec.v.decode_HRD).flatten(1, 2).contiguous()
        sealed, rings = (sealed_THD, sealed_TH), (rings_NHXPD, rings_R)
        self.attend_newest(output_THD, lse_TH, *sealed, *tokens, *rings, starts_R, lengths_R, softmax_scale, most)

    def attend_blocks(
        self,
        absorbed_THR: Tensor,
        pages_NHMB: Tensor,
        block_table_RN: Tensor,
        query_starts: Tensor,
        seq_lens: Tensor,
        softmax_scale: float,
        max_query_len: int,
        splits: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Absorbed queries on complete blocks alone: mixed latents `[tokens, query heads, v rank]` and lse, without the
        means' shares."""
        spec = self.plan.spec
        tokens, heads, _ = absorbed_THR.shape
        requests = seq_lens.shape[0]
        # Padding behind the last request is not written.
        mixed_THR = absorbed_THR.new_zeros(tokens, heads, spec.v.rank)
        lse_TH = absorbed_THR.new_zeros(tokens, heads)
        if splits is None:
            tiles = -(-max_query_len * heads // (spec.num_kv_heads * gpu.ROWS))
            context = block_table_RN.shape[1] * pages_NHMB.shape[2] * spec.block
            blocks = max(1, requests * spec.num_kv_heads * tiles)
            splits = gpu.choose_splits(blocks, context, gpu.multiprocessors(absorbed_THR.device))
        partial = splits * tokens * heads * (spec.v.rank + 1) if splits > 1 else 0
        workspace = absorbed_THR.new_empty(partial)
        args = BlockAttendArgs(
            pages=self.plan.pages_struct(pages_NHMB),
            query_THR=absorbed_THR.data_ptr(),
            output_THR=mixed_THR.data_ptr(),
            lse_TH=lse_TH.data_ptr(),
            workspace=workspace.data_ptr() if partial else None,
            block_table=block_table_RN.data_ptr(),
            block_table_stride=block_table_RN.stride(0),
            query_starts=query_starts.data_ptr(),
            seq_lens=seq_lens.data_ptr(),
            num_tokens=tokens,
            num_requests=requests,
            max_query_len=max_query_len,
            num_heads=heads,
            splits=splits,
            softmax_scale=softmax_scale,
            stream=gpu.stream(absorbed_THR.device),
        )
        cuda_library.check(self._kernels, self._kernels.kvc_cuda_attend_blocks(ctypes.byref(args)))
        return mixed_THR, lse_TH

    def attend_newest(
        self,
        output_THD: Tensor,
        lse_TH: Tensor | None,
        sealed_THD: Tensor,
        sealed_TH: Tensor,
        query_THD: Tensor,
        keys_THD: Tensor,
        values_THD: Tensor,
        rings_NHXPD: Tensor,
        ring_R: Tensor,
        query_starts: Tensor,
        seq_lens: Tensor,
        softmax_scale: float,
        max_query_len: int,
    ) -> None:
        """Attention on the tokens after each query's complete blocks, and the two merged."""
        spec = self.plan.spec
        assert sealed_THD.is_contiguous()
        assert lse_TH is None or (lse_TH.dtype == torch.float32 and lse_TH.is_contiguous())
        keys_THD, values_THD = (_aligned(rows) for rows in (keys_THD, values_THD))
        args = NewestArgs(
            rings=rings_struct(rings_NHXPD),
            query=rows_struct(query_THD),
            keys=rows_struct(keys_THD),
            values=rows_struct(values_THD),
            output=rows_struct(output_THD),
            sealed_THD=sealed_THD.data_ptr(),
            sealed_lse_TH=sealed_TH.data_ptr(),
            lse_TH=None if lse_TH is None else lse_TH.data_ptr(),
            k_mean_HD=self.plan.codec.k.mean_HD.data_ptr(),
            v_mean_HD=self.plan.codec.v.mean_HD.data_ptr(),
            ring_of=ring_R.data_ptr(),
            query_starts=query_starts.data_ptr(),
            seq_lens=seq_lens.data_ptr(),
            block=spec.block,
            num_requests=seq_lens.shape[0],
            max_query_len=max_query_len,
            num_heads=query_THD.shape[1],
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            softmax_scale=softmax_scale,
            stream=gpu.stream(query_THD.device),
        )
        cuda_library.check(self._kernels, self._kernels.kvc_cuda_attend_newest(ctypes.byref(args)))

    def keep(
        self,
        rings_NHXPD: Tensor,
        ring_R: Tensor,
        keys_THD: Tensor,
        values_THD: Tensor,
        query_starts: Numbers,
        seq_lens: Numbers,
    ) -> None:
        device = keys_THD.device
        ring_R, starts_R, lengths_R = (int32_rows(each, device) for each in (ring_R, query_starts, seq_lens))
        args = KeepArgs(
            rings=rings_struct(rings_NHXPD),
            keys=rows_struct(keys_THD),
            values=rows_struct(values_THD),
            ring_of=ring_R.data_ptr(),
            query_starts=starts_R.data_ptr(),
            seq_lens=lengths_R.data_ptr(),
            num_tokens=keys_THD.shape[0],
            num_requests=lengths_R.shape[0],
            num_kv_heads=keys_THD.shape[1],
            head_dim=keys_THD.shape[2],
            stream=gpu.stream(keys_THD.device),
        )
        cuda_library.check(self._kernels, self._kernels.kvc_cuda_keep(ctypes.byref(args)))

    def workspace_bytes(self, tokens: int, num_heads: int, longest: int) -> int:
        spec, device = self.plan.spec, self.plan.codec.k.mean_HD.device
        kernels = gpu.workspace_bytes(spec.head_dim, spec.k.rank, spec.v.rank, tokens, num_heads, device)
        return max(super().workspace_bytes(tokens, num_heads, longest), kernels)


def _aligned(rows_THD: Tensor) -> Tensor:
    """The same rows where the kernels can load whole vectors; a projection's always are there."""
    entries = _VECTOR // rows_THD.element_size()
    whole = rows_THD.data_ptr() % _VECTOR == 0 and all(stride % entries == 0 for stride in rows_THD.stride()[:2])
    return rows_THD if whole else rows_THD.clone(memory_format=torch.contiguous_format)
