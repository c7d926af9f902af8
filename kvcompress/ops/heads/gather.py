"""Pages back to latents: a workspace for a prefill that attends to a long cached prefix with ordinary kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.codec.heads.layout import TOKEN_MAJOR, PageLayout
from kvcompress.ops.heads import cuda, reference
from kvcompress.ops.heads.plan import HeadsPlan


def gather_decode(
    pages_NHX: Tensor,
    layout: PageLayout,
    plan: HeadsPlan,
    block_table_N: Tensor,
    length: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Normalized latents `[length, num_kv_heads, rank]` of one request's first tokens: keys' and values'.

    Times decode_HRD and plus mean_HD they are keys and values.

    Args:
        block_table_N: the request's blocks, in order.
        dtype: float32, bfloat16 or float16.
    """
    compiled = cuda.library_for(pages_NHX, layout, plan)
    if compiled is not None:
        block_table_N = block_table_N.to(device=pages_NHX.device, dtype=torch.int32).contiguous()
        return cuda.gather(compiled, pages_NHX, layout, plan, block_table_N, length, dtype)
    k_THR, v_THR = reference.gather_decode(pages_NHX, layout, plan, block_table_N, length)
    return k_THR.to(dtype), v_THR.to(dtype)


@torch.library.custom_op("kvcompress::gather_decode", mutates_args=())
def gather_decode_op(
    pages: Tensor,
    block_table: Tensor,
    length: int,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    block_size: int,
    order: str = TOKEN_MAJOR,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """`gather_decode` for graphs; tensors and numbers are `HeadsPlan.flatten()`'s."""
    plan = HeadsPlan.unflatten(tensors, numbers)
    return gather_decode(pages, PageLayout.of(plan.spec, block_size, order), plan, block_table, length, dtype)


@gather_decode_op.register_fake
def _(
    pages: Tensor,
    block_table: Tensor,
    length: int,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    block_size: int,
    order: str = TOKEN_MAJOR,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    plan = HeadsPlan.unflatten(tensors, numbers)
    k_THR, v_THR = (pages.new_empty(length, pages.shape[1], side.spec.rank, dtype=dtype) for side in (plan.k, plan.v))
    return k_THR, v_THR
