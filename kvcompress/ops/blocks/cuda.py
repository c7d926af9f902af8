"""The CUDA kernels for the form `blocks` on torch tensors (csrc/include/kvcompress/cuda_blocks.h).

As for pages of single tokens (`ops.cuda`), queries are absorbed and outputs expanded by torch, and nothing here waits
for the device or reads from it. Pages hold the same bytes as for the CPU.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvcompress.codec.blocks.spec import BlockSide
from kvcompress.codec.heads.layout import CHUNK_TOKENS
from kvcompress.ops import cuda_library, gpu, interface
from kvcompress.ops.blocks.plan import BlocksPlan, rings_struct
from kvcompress.ops.rows import DTYPES, rows_struct

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


def library_for(pages_NHMB: Tensor, plan: BlocksPlan, rings_NHXPD: Tensor, *rows_THD: Tensor) -> ctypes.CDLL | None:
    """The kernels, if these tensors are on a GPU and the kernels cover them."""
    found = gpu.kernels(pages_NHMB.device)
    if found is None or not covered(plan, pages_NHMB.shape[2]):
        return None
    if any(rows.device != pages_NHMB.device or rows.dtype not in DTYPES for rows in (rings_NHXPD, *rows_THD)):
        return None
    return found if all(rows.stride(-1) == 1 for rows in rows_THD) else None


def keeping_library_for(rings_NHXPD: Tensor, *rows_THD: Tensor) -> ctypes.CDLL | None:
    """The kernels, if rings and rows are on a GPU; they take any shape."""
    found = gpu.kernels(rings_NHXPD.device)
    known = all(rows.dtype in DTYPES and rows.device == rings_NHXPD.device for rows in (rings_NHXPD, *rows_THD))
    return found if known and all(rows.stride(-1) == 1 for rows in rows_THD) else None


def covered(plan: BlocksPlan, per_page: int) -> bool:
    """Whether there is a kernel for this layer, with so many blocks in a page.

    Blocks are of 64 tokens that share their keys' scales, ranks multiples of 16, residuals of even rank, and values
    change their scale between columns of 64 channels or not at all.
    """
    spec = plan.spec
    sides = (spec.k, spec.v)
    known = all(side.rank <= MAX_RANK and side.rank % 16 == 0 for side in sides)
    known = known and all(side.low_rank <= MAX_LOW_RANK and side.low_rank % 2 == 0 for side in sides)
    known = known and (spec.k.bits, spec.v.bits) in BITS
    heads = spec.head_dim <= MAX_HEAD_DIM and spec.head_dim % 8 == 0
    pages = spec.block == CHUNK_TOKENS and per_page & (per_page - 1) == 0
    return known and heads and pages and _groups_known(spec.k, spec.v)


def _groups_known(k: BlockSide, v: BlockSide) -> bool:
    keys = k.along == "tokens" and k.group >= k.block
    return keys and v.along == "channels" and (v.group >= v.rank or v.group % _COLUMN == 0)


def attend(
    library: ctypes.CDLL,
    output_THD: Tensor,
    query_THD: Tensor,
    keys_THD: Tensor,
    values_THD: Tensor,
    pages_NHMB: Tensor,
    rings_NHXPD: Tensor,
    ring_R: Tensor,
    plan: BlocksPlan,
    block_table_RN: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    lse_TH: Tensor | None,
    max_query_len: int,
    splits: int | None = None,
) -> None:
    """`ops.blocks.attend` with everything on the device; numbers are int32, those of a row side by side.

    Args:
        max_query_len: at least the most queries of a request.
        splits: parts a request's blocks are cut into; chosen from shapes alone if not given.
    """
    batch = (query_starts, seq_lens, softmax_scale, max_query_len)
    grouped_THGD = query_THD.float().unflatten(1, (plan.spec.num_kv_heads, -1))
    absorbed_THGR = torch.einsum("thgd,hdr->thgr", grouped_THGD, plan.k_decode_HDR)
    mixed_THR, sealed_TH = attend_blocks(
        library, absorbed_THGR.flatten(1, 2).contiguous(), pages_NHMB, plan, block_table_RN, *batch, splits
    )
    mixed_THGR = mixed_THR.unflatten(1, (plan.spec.num_kv_heads, -1))
    sealed_THD = torch.einsum("thgr,hrd->thgd", mixed_THGR, plan.v_decode_HRD).flatten(1, 2).contiguous()
    newest = (query_THD, keys_THD, values_THD, rings_NHXPD, ring_R)
    attend_newest(library, output_THD, lse_TH, sealed_THD, sealed_TH, *newest, plan, *batch)


def attend_blocks(
    library: ctypes.CDLL,
    absorbed_THR: Tensor,
    pages_NHMB: Tensor,
    plan: BlocksPlan,
    block_table_RN: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    max_query_len: int,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed queries on complete blocks alone: mixed latents `[tokens, query heads, v rank]` and lse, without the
    means' shares."""
    spec = plan.spec
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
        pages=plan.pages_struct(pages_NHMB),
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
    cuda_library.check(library, library.kvc_cuda_attend_blocks(ctypes.byref(args)))
    return mixed_THR, lse_TH


def attend_newest(
    library: ctypes.CDLL,
    output_THD: Tensor,
    lse_TH: Tensor | None,
    sealed_THD: Tensor,
    sealed_TH: Tensor,
    query_THD: Tensor,
    keys_THD: Tensor,
    values_THD: Tensor,
    rings_NHXPD: Tensor,
    ring_R: Tensor,
    plan: BlocksPlan,
    query_starts: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    max_query_len: int,
) -> None:
    """Attention on the tokens after each query's complete blocks, and the two merged."""
    spec = plan.spec
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
        k_mean_HD=plan.k_mean_HD.data_ptr(),
        v_mean_HD=plan.v_mean_HD.data_ptr(),
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
    cuda_library.check(library, library.kvc_cuda_attend_newest(ctypes.byref(args)))


def keep(
    library: ctypes.CDLL,
    rings_NHXPD: Tensor,
    ring_R: Tensor,
    keys_THD: Tensor,
    values_THD: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
) -> None:
    """`ops.block_store.keep` with everything on the device; numbers are int32."""
    args = KeepArgs(
        rings=rings_struct(rings_NHXPD),
        keys=rows_struct(keys_THD),
        values=rows_struct(values_THD),
        ring_of=ring_R.data_ptr(),
        query_starts=query_starts.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        num_tokens=keys_THD.shape[0],
        num_requests=seq_lens.shape[0],
        num_kv_heads=keys_THD.shape[1],
        head_dim=keys_THD.shape[2],
        stream=gpu.stream(keys_THD.device),
    )
    cuda_library.check(library, library.kvc_cuda_keep(ctypes.byref(args)))


def _aligned(rows_THD: Tensor) -> Tensor:
    """The same rows where the kernels can load whole vectors; a projection's always are there."""
    entries = _VECTOR // rows_THD.element_size()
    whole = rows_THD.data_ptr() % _VECTOR == 0 and all(stride % entries == 0 for stride in rows_THD.stride()[:2])
    return rows_THD if whole else rows_THD.clone(memory_format=torch.contiguous_format)
