"""Latent attention on paged memory: one vector per token is the key of all heads, and its start the value.

Pages are `[blocks, tokens per block, channels]` in float32, bfloat16 or float16; blocks may be strided. A slot is
block * tokens per block + offset.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.ops import interface, library
from kvcompress.ops.latent import cuda as cuda_latent
from kvcompress.ops.latent import reference as latent_reference
from kvcompress.ops.latent.plan import latent_pages_struct
from kvcompress.ops.rows import host_list, int32_rows, most_queries, rows_covered, rows_struct

SPLIT_TOKENS = 1024
"""Tokens one thread attends at a time: fewer than of per-head pages, because all heads are one piece of work."""


def append(pages_NSC: Tensor, key_TC: Tensor, slots_T: Tensor) -> None:
    """Store tokens `[tokens, channels]` in their slots. Slots below 0 are padding and are skipped.

    Raises:
        ValueError: a slot lies outside the cache. On a GPU it is skipped.
    """
    on_device = cuda_latent.library_for(pages_NSC)
    if on_device is not None and cuda_latent.covers_append(pages_NSC, key_TC):
        cuda_latent.append(on_device, pages_NSC, key_TC, slots_T)
        return
    covered = _covered(pages_NSC) and rows_covered(key_TC) and key_TC.shape[1] == pages_NSC.shape[2]
    compiled = library.load() if covered else None
    if compiled is None:
        latent_reference.append(pages_NSC, key_TC, slots_T)
        return
    assert key_TC.shape[0] == slots_T.shape[0]
    slots_T = slots_T.to(torch.int64).contiguous()
    args = interface.LatentAppendArgs(
        pages=latent_pages_struct(pages_NSC),
        keys=rows_struct(key_TC[:, None]),
        slots=slots_T.data_ptr(),
        num_tokens=slots_T.shape[0],
        level=library.level(),
    )
    library.check(compiled.kvc_latent_append(ctypes.byref(args)))


def attend(
    output_THR: Tensor,
    query_THC: Tensor,
    pages_NSC: Tensor,
    block_table_RN: Tensor,
    query_starts: Tensor | Sequence[int],
    seq_lens: Tensor | Sequence[int],
    softmax_scale: float,
    split_tokens: int = SPLIT_TOKENS,
    max_query_len: int | None = None,
) -> None:
    """Causal attention of every request's new tokens over all of its tokens, in float32.

    Args:
        output_THR: written in place; R, the latent's channels, are the first of the cached vector's.
        query_THC: absorbed queries `[tokens, heads, channels]`; float32, bfloat16 or float16.
        pages_NSC: what `append` has stored, the new tokens included.
        block_table_RN: blocks of each request, in order; entries past its end are not read.
        query_starts: where each request's new tokens start in query and output, and where the last one's end.
        seq_lens: tokens of each request, new ones included.
        softmax_scale: on the product of query and cached vector.
        split_tokens: a positive multiple of 64; of no effect on a GPU.
        max_query_len: the most queries of a request, for a GPU: its kernels read lengths on the device, and start
            enough threads for any lengths.

    Raises:
        ValueError: a request has more queries than tokens, or a block lies outside the cache; neither is looked for on
            a GPU.
    """
    on_device = cuda_latent.library_for(pages_NSC)
    if on_device is not None and cuda_latent.covers_attention(on_device, output_THR, query_THC, pages_NSC):
        if max_query_len is None:
            max_query_len = most_queries(query_starts, query_THC.shape[0])
        table_RN, starts_R, lengths_R = (
            int32_rows(numbers, query_THC.device) for numbers in (block_table_RN, query_starts, seq_lens)
        )
        batch = (pages_NSC, table_RN, starts_R, lengths_R)
        cuda_latent.attend(on_device, output_THR, query_THC, *batch, softmax_scale, max_query_len)
        return
    compiled = library.load() if _covered(pages_NSC) and rows_covered(query_THC, output_THR) else None
    if compiled is None:
        starts, lengths = host_list(query_starts), host_list(seq_lens)
        latent_reference.attend(output_THR, query_THC, pages_NSC, block_table_RN, starts, lengths, softmax_scale)
        return
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
    library.check(compiled.kvc_latent_attend(ctypes.byref(args)))


def _covered(pages_NSC: Tensor) -> bool:
    channels = pages_NSC.shape[2]
    return rows_covered(pages_NSC) and channels <= interface.MAX_LATENT_CHANNELS


@torch.library.custom_op("kvcompress::latent_append", mutates_args=("pages",))
def append_op(pages: Tensor, keys: Tensor, slots: Tensor) -> None:
    """`append` for graphs."""
    append(pages, keys, slots)


@append_op.register_fake
def _(pages: Tensor, keys: Tensor, slots: Tensor) -> None:
    return None


@torch.library.custom_op("kvcompress::latent_attention", mutates_args=())
def attend_op(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    rank: int,
    softmax_scale: float,
    max_query_len: int | None = None,
) -> Tensor:
    """`attend` for graphs; the output's channels are the first `rank`."""
    output = query.new_zeros(*query.shape[:2], rank)
    batch = (block_table, query_starts, seq_lens)
    attend(output, query, pages, *batch, softmax_scale, max_query_len=max_query_len)
    return output


@attend_op.register_fake
def _(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    rank: int,
    softmax_scale: float,
    max_query_len: int | None = None,
) -> Tensor:
    return query.new_empty(*query.shape[:2], rank)
