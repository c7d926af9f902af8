"""Attention over compressed pages for a batch of requests."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.codec.heads.layout import TOKEN_MAJOR, PageLayout
from kvcompress.ops import gpu, interface, library
from kvcompress.ops.heads import cuda, prefill, reference
from kvcompress.ops.heads.plan import HeadsPlan
from kvcompress.ops.rows import host_list, int32_rows, most_queries, rows_covered, rows_struct

SPLIT_TOKENS = 4096
"""Tokens one thread attends at a time. Fixed positions, so that a result depends on nothing but its own tokens."""


def decode_attention(
    output_THD: Tensor,
    query_THD: Tensor,
    pages_NHX: Tensor,
    layout: PageLayout,
    plan: HeadsPlan,
    block_table_RN: Tensor,
    query_starts: Tensor | Sequence[int],
    seq_lens: Tensor | Sequence[int],
    softmax_scale: float,
    lse_TH: Tensor | None = None,
    split_tokens: int = SPLIT_TOKENS,
    max_query_len: int | None = None,
) -> None:
    """Causal attention of every request's newest tokens over all its tokens, which `append` has stored already.

    Args:
        output_THD: result, written in place `[tokens, query heads, head_dim]`.
        query_THD: post-RoPE queries of all requests, one after the other; float32, bfloat16 or float16.
        pages_NHX: `uint8 [num_blocks, num_kv_heads, record_bytes]`; blocks may be strided.
        block_table_RN: block numbers of each request's tokens, in order; entries past a request's end are not read.
        query_starts: where each request's queries begin, and the end of the last `[requests + 1]`.
        seq_lens: tokens of each request, its queries' own included `[requests]`. On a GPU, numbers of a few queries
            per request should be the device's, numbers of more the host's: then nobody waits.
        softmax_scale: usually head_dim ** -0.5.
        lse_TH: if given, receives each row's log of the sum of exponentials, float32 `[tokens, query heads]`.
        split_tokens: a positive multiple of 64; of no effect on a GPU.
        max_query_len: the most queries of a request, for a GPU: its kernels read lengths on the device, and start
            enough threads for any lengths. More than `gpu.MOST_QUERIES` are a prefill: torch attends (`prefill`).

    Raises:
        ValueError: a request has more queries than tokens, or a block lies outside the cache; neither is looked for on
            a GPU.
    """
    on_device = cuda.library_for(pages_NHX, layout, plan, query_THD, output_THD)
    if on_device is not None and max_query_len is None:
        max_query_len = most_queries(query_starts, query_THD.shape[0])
    if on_device is not None and max_query_len is not None and max_query_len <= gpu.MOST_QUERIES:
        table_RN, starts_R, lengths_R = (
            int32_rows(numbers, query_THD.device) for numbers in (block_table_RN, query_starts, seq_lens)
        )
        cuda.attend(
            on_device,
            output_THD,
            query_THD,
            pages_NHX,
            layout,
            plan,
            table_RN,
            starts_R,
            lengths_R,
            softmax_scale,
            lse_TH,
            max_query_len,
        )
        return
    covered = plan.covered(layout, pages_NHX) and rows_covered(query_THD, output_THD)
    compiled = library.load() if covered else None
    if compiled is None:
        starts, lengths = host_list(query_starts), host_list(seq_lens)
        batch = (output_THD, query_THD, pages_NHX, layout, plan, block_table_RN, starts, lengths, softmax_scale)
        if on_device is not None and lse_TH is None and query_THD.dtype in prefill.FUSED_DTYPES:
            prefill.attend(*batch)
        else:
            reference.decode_attention(*batch, lse_TH)
        return
    assert lse_TH is None or (lse_TH.dtype == torch.float32 and lse_TH.is_contiguous())
    block_table_RN, starts_R, lengths_R = (int32_rows(each) for each in (block_table_RN, query_starts, seq_lens))
    requests = lengths_R.shape[0]
    assert starts_R.shape[0] == requests + 1
    assert block_table_RN.shape[0] >= requests
    args = interface.AttendArgs(
        pages=plan.pages_struct(pages_NHX, layout),
        query=rows_struct(query_THD),
        output=rows_struct(output_THD),
        lse_TH=None if lse_TH is None else lse_TH.data_ptr(),
        k_decode_HDR=plan.k_decode_HDR.data_ptr(),
        k_mean_HD=plan.k.mean_HD.data_ptr(),
        v_decode_HRD=plan.v.decode_HRD.data_ptr(),
        v_mean_HD=plan.v.mean_HD.data_ptr(),
        block_table=block_table_RN.data_ptr(),
        block_table_stride=block_table_RN.stride(0) if requests > 1 else block_table_RN.shape[1],
        query_starts=starts_R.data_ptr(),
        seq_lens=lengths_R.data_ptr(),
        num_requests=requests,
        num_heads=query_THD.shape[1],
        softmax_scale=softmax_scale,
        split_tokens=split_tokens,
        threads=torch.get_num_threads(),
        level=library.level(),
    )
    library.check(compiled.kvc_attend(ctypes.byref(args)))


@torch.library.custom_op("kvcompress::decode_attention", mutates_args=())
def decode_attention_op(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    block_size: int,
    softmax_scale: float,
    order: str = TOKEN_MAJOR,
    max_query_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode_attention` for graphs: output and lse; tensors and numbers are `HeadsPlan.flatten()`'s."""
    plan = HeadsPlan.unflatten(tensors, numbers)
    layout = PageLayout.of(plan.spec, block_size, order)
    output, lse = torch.zeros_like(query), query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
    batch = (block_table, query_starts, seq_lens)
    decode_attention(output, query, pages, layout, plan, *batch, softmax_scale, lse, max_query_len=max_query_len)
    return output, lse


@decode_attention_op.register_fake
def _(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    block_size: int,
    softmax_scale: float,
    order: str = TOKEN_MAJOR,
    max_query_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
