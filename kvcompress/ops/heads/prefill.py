"""Attention of many queries of one request on a GPU: keys and values are decoded once, and torch attends to them.

The kernels of `cuda` read the cache once for every eight rows, which is right for a few queries and wasteful for a
chunk of a prompt. Torch's fused attention needs keys and values in the model's dtype; they are as exact as those that
the model computes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.ops.call import Call
from kvcompress.ops.heads.reference import HeadsOp

STEP_TOKENS = 8192
"""Tokens decoded at a time: their float32 latents are workspace beside the keys and values."""

FUSED_DTYPES = (torch.float16, torch.bfloat16)
"""What torch has fused attention for; in float32 it would hold all scores."""


def attend(op: HeadsOp, call: Call, pages_NHX: Tensor) -> None:
    """`HeadsOp.attend`, request after request; queries in one of `FUSED_DTYPES`."""
    for request, rows, length in call.requests():
        table_N = call.block_table_RN[request]
        call.output_THD[rows] = _attend(op, call.query_THD[rows], pages_NHX, table_N, length, call.softmax_scale)


def workspace_bytes(spec: HeadsSpec, queries: int, num_heads: int, longest: int, dtype: torch.dtype) -> int:
    """Bytes that `attend` takes at most beside its arguments, for requests of `longest` tokens."""
    decoded = 2 * longest * spec.num_kv_heads * spec.head_dim * dtype.itemsize
    # Both sides' latents of a step, and a side's product.
    step = (
        min(longest, STEP_TOKENS)
        * spec.num_kv_heads
        * (spec.k.rank + spec.v.rank + spec.head_dim)
        * torch.float32.itemsize
    )
    # Output, and the row's log of sums.
    attended = queries * num_heads * (spec.head_dim * dtype.itemsize + torch.float32.itemsize)
    return decoded + max(step, attended)


def _attend(
    op: HeadsOp, query_QHD: Tensor, pages_NHX: Tensor, block_table_N: Tensor, length: int, softmax_scale: float
) -> Tensor:
    """One request's newest queries. A call of its own, so that decoded keys do not outlive it."""
    queries = query_QHD.shape[0]
    assert queries <= length
    key_HTD, value_HTD = _decoded(op, pages_NHX, block_table_N, length, query_QHD.dtype)
    mixed_1HQD = torch.nn.functional.scaled_dot_product_attention(
        query_QHD.transpose(0, 1)[None],
        key_HTD[None],
        value_HTD[None],
        attn_mask=causal_lower_right(queries, length),
        scale=softmax_scale,
        enable_gqa=True,
    )
    return mixed_1HQD[0].transpose(0, 1)


def _decoded(
    op: HeadsOp, pages_NHX: Tensor, block_table_N: Tensor, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of a request's first tokens `[KV heads, length, head_dim]`."""
    codec, block_size = op.plan.codec, op.layout(pages_NHX).block_size
    shape = (codec.spec.num_kv_heads, length, codec.spec.head_dim)
    sides = tuple(torch.empty(shape, dtype=dtype, device=pages_NHX.device) for _ in range(2))
    blocks = max(1, STEP_TOKENS // block_size)
    for first in range(0, -(-length // block_size), blocks):
        start = first * block_size
        tokens = min(length - start, blocks * block_size)
        latents = op.read(pages_NHX, block_table_N[first : first + blocks], tokens)
        for side_HTD, side, latent_THR in zip(sides, (codec.k, codec.v), latents, strict=True):
            product_HTD = torch.einsum("thr,hrd->htd", latent_THR, side.decode_HRD)
            side_HTD[:, start : start + tokens] = product_HTD.add_(side.mean_HD[:, None])
            del product_HTD  # before the next one is made
    return sides[0], sides[1]
