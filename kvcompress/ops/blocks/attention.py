"""Attention over complete blocks in pages and newer tokens in rings, for a batch of requests."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.ops import gpu, interface, library
from kvcompress.ops.blocks import cuda as cuda_blocks
from kvcompress.ops.blocks import reference as block_reference
from kvcompress.ops.blocks.plan import BlocksPlan, rings_struct
from kvcompress.ops.heads.attention import SPLIT_TOKENS
from kvcompress.ops.rows import host_list, int32_rows, most_queries, rows_covered, rows_struct


def attend(
    output_THD: Tensor,
    query_THD: Tensor,
    keys_THD: Tensor,
    values_THD: Tensor,
    pages_NHMB: Tensor,
    rings_NHXPD: Tensor,
    ring_R: Tensor | Sequence[int],
    plan: BlocksPlan,
    block_table_RN: Tensor,
    query_starts: Tensor | Sequence[int],
    seq_lens: Tensor | Sequence[int],
    softmax_scale: float,
    lse_TH: Tensor | None = None,
    split_tokens: int = SPLIT_TOKENS,
    max_query_len: int | None = None,
) -> None:
    """Causal attention of every request's newest tokens; `codec.gear` says what each of them sees.

    Args:
        output_THD: result, written in place `[tokens, query heads, head_dim]`.
        query_THD: post-RoPE queries of all requests, one after the other; float32, bfloat16 or float16.
        keys_THD, values_THD: the same tokens' own `[tokens, KV heads, head_dim]`.
        pages_NHMB: `uint8 [pages, KV heads, blocks per page, record_bytes]`; every block that the requests' tokens
            complete is in its page already. Pages may be strided.
        rings_NHXPD: `[rings, KV heads, 2 (keys, values), places, head_dim]`: the token at position p of an incomplete
            block, from before this step, is in place p % places.
        ring_R: the ring of each request.
        block_table_RN: pages of each request, in order; entries past its complete blocks are not read.
        query_starts: where each request's queries begin, and the end of the last `[requests + 1]`.
        seq_lens: tokens of each request, its queries' own included `[requests]`.
        softmax_scale: usually head_dim ** -0.5.
        lse_TH: if given, receives each row's log of the sum of exponentials, float32 `[tokens, query heads]`.
        split_tokens: tokens one thread attends at a time, rounded up to whole blocks; of no effect on a GPU.
        max_query_len: the most queries of a request, for a GPU: its kernels read lengths on the device, and start
            enough threads for any lengths. More than a few are a prefill, which torch attends on decoded blocks.

    Raises:
        ValueError: a request has more queries than tokens, or a page or ring lies outside the cache; neither is looked
            for on a GPU.
    """
    rows = (query_THD, output_THD, keys_THD, values_THD)
    on_device = cuda_blocks.library_for(pages_NHMB, plan, rings_NHXPD, *rows)
    if on_device is not None and max_query_len is None:
        max_query_len = most_queries(query_starts, query_THD.shape[0])
    if on_device is not None and max_query_len is not None and max_query_len <= gpu.MOST_QUERIES:
        ring_R, block_table_RN, starts, lengths = (
            int32_rows(each, query_THD.device) for each in (ring_R, block_table_RN, query_starts, seq_lens)
        )
        cuda_blocks.attend(
            on_device,
            output_THD,
            query_THD,
            keys_THD,
            values_THD,
            pages_NHMB,
            rings_NHXPD,
            ring_R,
            plan,
            block_table_RN,
            starts,
            lengths,
            softmax_scale,
            lse_TH,
            max_query_len,
        )
        return
    covered = plan.covered() and pages_NHMB.device.type == "cpu"
    covered = covered and rows_covered(query_THD, output_THD, keys_THD, values_THD, rings_NHXPD)
    compiled = library.load() if covered else None
    if compiled is None:
        block_reference.attend(
            output_THD,
            query_THD,
            keys_THD,
            values_THD,
            pages_NHMB,
            rings_NHXPD,
            host_list(ring_R),
            plan.codec,
            block_table_RN,
            host_list(query_starts),
            host_list(seq_lens),
            softmax_scale,
            lse_TH,
        )
        return
    spec = plan.spec
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
        pages=plan.pages_struct(pages_NHMB),
        rings=rings_struct(rings_NHXPD),
        query=rows_struct(query_THD),
        keys=rows_struct(keys_THD),
        values=rows_struct(values_THD),
        output=rows_struct(output_THD),
        lse_TH=None if lse_TH is None else lse_TH.data_ptr(),
        k_decode_HDR=plan.k_decode_HDR.data_ptr(),
        k_mean_HD=plan.k_mean_HD.data_ptr(),
        v_decode_HRD=plan.v_decode_HRD.data_ptr(),
        v_mean_HD=plan.v_mean_HD.data_ptr(),
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
    library.check(compiled.kvc_attend_blocks(ctypes.byref(args)))


@torch.library.custom_op("kvcompress::block_attention", mutates_args=())
def block_attention_op(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    rings: Tensor,
    ring_of: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """`attend` for graphs: output and lse; tensors and numbers are `BlocksPlan.flatten()`'s."""
    plan = BlocksPlan.unflatten(tensors, numbers)
    output, lse = torch.zeros_like(query), query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
    attend(
        output,
        query,
        keys,
        values,
        pages,
        rings,
        ring_of,
        plan,
        block_table,
        query_starts,
        seq_lens,
        softmax_scale,
        lse,
    )
    return output, lse


@block_attention_op.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    rings: Tensor,
    ring_of: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
