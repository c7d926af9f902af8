"""The operations of form `heads` as torch ops (`ops.graph`)."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.codec.bands import SideSpec
from kvcompress.ops.call import Call
from kvcompress.ops.graph import unflatten
from kvcompress.ops.heads.attention import bind


@torch.library.custom_op("kvcompress::heads_append", mutates_args=("pages",))
def heads_append(
    pages: Tensor, keys: Tensor, values: Tensor, slots: Tensor, tensors: Sequence[Tensor], spec: str
) -> None:
    bind(unflatten(tensors, spec), pages.device).append(pages, keys, values, slots)


@torch.library.custom_op("kvcompress::heads_compress", mutates_args=("pages",))
def heads_compress(
    pages: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, tensors: Sequence[Tensor], spec: str
) -> None:
    bind(unflatten(tensors, spec), pages.device).compress(pages, keys, values, blocks)


@torch.library.custom_op("kvcompress::heads_read", mutates_args=())
def heads_read(
    pages: Tensor,
    block_table: Tensor,
    length: int,
    tensors: Sequence[Tensor],
    spec: str,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    return bind(unflatten(tensors, spec), pages.device).read(pages, block_table, length, dtype)


@torch.library.custom_op("kvcompress::heads_attend", mutates_args=())
def heads_attend(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    tensors: Sequence[Tensor],
    spec: str,
    max_query_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    output, lse = torch.zeros_like(query), query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
    call = Call(output, query, block_table, query_starts, seq_lens, softmax_scale, lse, max_query_len)
    bind(unflatten(tensors, spec), pages.device).attend(call, pages)
    return output, lse


for _op in (heads_append, heads_compress):
    _op.register_fake(lambda *_, **__: None)


@heads_read.register_fake
def _(
    pages: Tensor,
    block_table: Tensor,
    length: int,
    tensors: Sequence[Tensor],
    spec: str,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    layer = json.loads(spec)
    k_THR, v_THR = (
        pages.new_empty(length, pages.shape[1], SideSpec.from_json(layer[side]).rank, dtype=dtype) for side in "kv"
    )
    return k_THR, v_THR


heads_attend.register_fake(
    lambda query, *_, **__: (torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32))
)
