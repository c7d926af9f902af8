"""Stored tokens back to plain keys and values, for attention with kernels that know no codec."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.codec.layout import PageLayout
from kvcompress.ops import library, reference
from kvcompress.ops.attention import host_list, int32_tensor, table_tensor
from kvcompress.ops.plan import LayerPlan, rows_covered, rows_struct


def gather_decode(
    pages_NHX: Tensor,
    layout: PageLayout,
    plan: LayerPlan,
    block_table_RN: Tensor,
    seq_lens: Tensor | Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Keys and values of requests, as attention on their pages sees them.

    Args:
        pages_NHX: `uint8 [num_blocks, num_kv_heads, record_bytes]`; blocks may be strided.
        block_table_RN: block numbers of each request's tokens, in order; entries past a request's end are not read.
        seq_lens: tokens of each request `[requests]`.

    Returns:
        `[tokens, num_kv_heads, head_dim]` each, one request after the other, tokens inside heads in memory, where
        attention reads a head's tokens one after the other.

    Raises:
        ValueError: a block lies outside the cache.
    """
    tokens = sum(host_list(seq_lens))
    shape = (layout.num_kv_heads, tokens, plan.k.mean_HD.shape[1])
    keys_THD, values_THD = (torch.empty(shape, dtype=dtype, device=pages_NHX.device).transpose(0, 1) for _ in range(2))
    covered = plan.covered() and pages_NHX.device.type == "cpu" and rows_covered(keys_THD, values_THD)
    compiled = library.load() if covered else None
    if compiled is None:
        reference.gather_decode(keys_THD, values_THD, pages_NHX, layout, plan, block_table_RN, host_list(seq_lens))
        return keys_THD, values_THD
    lengths_R = int32_tensor(seq_lens)
    table_RN, requests = table_tensor(block_table_RN), lengths_R.shape[0]
    assert table_RN.shape[0] >= requests
    args = library.GatherArgs(
        pages=plan.pages_struct(pages_NHX, layout),
        keys=rows_struct(keys_THD),
        values=rows_struct(values_THD),
        k_decode_HRD=plan.k.decode_HRD.data_ptr(),
        k_mean_HD=plan.k.mean_HD.data_ptr(),
        v_decode_HRD=plan.v.decode_HRD.data_ptr(),
        v_mean_HD=plan.v.mean_HD.data_ptr(),
        block_table=table_RN.data_ptr(),
        block_table_stride=table_RN.stride(0) if requests > 1 else table_RN.shape[1],
        seq_lens=lengths_R.data_ptr(),
        num_requests=requests,
        threads=torch.get_num_threads(),
        level=library.level(),
    )
    library.check(compiled.kvc_gather(ctypes.byref(args)))
    return keys_THD, values_THD


@torch.library.custom_op("kvcompress::gather_decode", mutates_args=())
def gather_decode_op(
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    total_tokens: int,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`gather_decode` for graphs; `total_tokens` is the sum of `seq_lens`, tensors and numbers are
    `LayerPlan.flatten()`'s."""
    plan = LayerPlan.unflatten(tensors, numbers)
    keys, values = gather_decode(pages, PageLayout.of(plan.spec, block_size), plan, block_table, seq_lens, dtype)
    assert keys.shape[0] == total_tokens
    return keys, values


@gather_decode_op.register_fake
def _(
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    total_tokens: int,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    heads, head_dim = tensors[0].shape
    keys = pages.new_empty((heads, total_tokens, head_dim), dtype=dtype).transpose(0, 1)
    return keys, torch.empty_like(keys)
