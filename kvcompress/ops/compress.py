"""Storing many tokens of requests at once, found by block table: what follows a prefill in plain memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.codec.layout import PageLayout
from kvcompress.ops.append import append
from kvcompress.ops.plan import LayerPlan


def compress_pages(
    pages_NHX: Tensor,
    layout: PageLayout,
    plan: LayerPlan,
    keys_THD: Tensor,
    values_THD: Tensor,
    block_table_RN: Tensor,
    starts_R: Tensor,
    seq_lens: Tensor,
) -> None:
    """Encode every request's newest tokens and store them in its blocks: `append`, with slots from the block table.

    Args:
        pages_NHX: written in place.
        keys_THD, values_THD: the newest tokens of all requests, one request after the other.
        block_table_RN: block numbers of each request's tokens, in order.
        starts_R: where each request's tokens begin in keys and values, and the end of the last `[requests + 1]`.
        seq_lens: tokens of each request once they are stored `[requests]`.

    Raises:
        ValueError: a request has more new tokens than tokens, or a block lies outside the cache.
    """
    count_R = starts_R.diff()
    if bool((count_R > seq_lens).any()):
        raise ValueError(f"found {count_R.tolist()} new tokens in requests of {seq_lens.tolist()} tokens")
    request_T = torch.repeat_interleave(count_R)
    position_T = torch.arange(len(request_T), device=count_R.device) - (starts_R[1:] - seq_lens)[request_T]
    block_T = block_table_RN[request_T, position_T // layout.block_size].long()
    if bool((block_T < 0).any()):
        raise ValueError("a block table names a block outside the cache: a number below 0 for a token to be stored")
    append(pages_NHX, layout, plan, keys_THD, values_THD, block_T * layout.block_size + position_T % layout.block_size)


@torch.library.custom_op("kvcompress::compress_pages", mutates_args=("pages",))
def compress_pages_op(
    pages: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    starts: Tensor,
    seq_lens: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    block_size: int,
) -> None:
    """`compress_pages` for graphs; tensors and numbers are `LayerPlan.flatten()`'s."""
    plan = LayerPlan.unflatten(tensors, numbers)
    layout = PageLayout.of(plan.spec, block_size)
    compress_pages(pages, layout, plan, keys, values, block_table, starts, seq_lens)


@compress_pages_op.register_fake
def _(
    pages: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    starts: Tensor,
    seq_lens: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    block_size: int,
) -> None:
    return None
