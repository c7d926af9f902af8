"""Encoding whole blocks of tokens: what a prefill leaves behind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.codec.heads.layout import TOKEN_MAJOR, PageLayout
from kvcompress.ops.heads import cuda
from kvcompress.ops.heads.append import append
from kvcompress.ops.heads.plan import HeadsPlan


def compress_pages(
    pages_NHX: Tensor, layout: PageLayout, plan: HeadsPlan, keys_THD: Tensor, values_THD: Tensor, blocks_N: Tensor
) -> None:
    """Encode tokens that fill blocks one after the other; the same bytes as `append`, sooner.

    Args:
        pages_NHX: `uint8 [num_blocks, num_kv_heads, record_bytes]`, written in place; blocks may be strided.
        keys_THD, values_THD: `[len(blocks_N) * block_size, num_kv_heads, head_dim]`, keys after RoPE.
        blocks_N: which blocks.

    Raises:
        ValueError: there are not as many tokens as the blocks hold; or, not on a GPU, a block lies outside the cache.
    """
    tokens = blocks_N.shape[0] * layout.block_size
    if keys_THD.shape[0] != tokens:
        raise ValueError(
            f"found {keys_THD.shape[0]} tokens for {blocks_N.shape[0]} blocks of {layout.block_size}; expected {tokens}"
        )
    compiled = cuda.library_for(pages_NHX, layout, plan, keys_THD, values_THD)
    if compiled is not None:
        blocks_N = blocks_N.to(device=pages_NHX.device, dtype=torch.int64).contiguous()
        cuda.append(compiled, pages_NHX, layout, plan, keys_THD, values_THD, blocks_N=blocks_N)
        return
    offset_S = torch.arange(layout.block_size, device=blocks_N.device)
    slots_T = (blocks_N.long()[:, None] * layout.block_size + offset_S).flatten()
    append(pages_NHX, layout, plan, keys_THD, values_THD, slots_T)


@torch.library.custom_op("kvcompress::compress_pages", mutates_args=("pages",))
def compress_pages_op(
    pages: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    block_size: int,
    order: str = TOKEN_MAJOR,
) -> None:
    """`compress_pages` for graphs; tensors and numbers are `HeadsPlan.flatten()`'s."""
    plan = HeadsPlan.unflatten(tensors, numbers)
    compress_pages(pages, PageLayout.of(plan.spec, block_size, order), plan, keys, values, blocks)


@compress_pages_op.register_fake
def _(
    pages: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    block_size: int,
    order: str = TOKEN_MAJOR,
) -> None:
    return None
