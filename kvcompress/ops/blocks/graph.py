"""The operations of form `blocks` as torch ops (`ops.graph`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.ops.blocks.attention import bind
from kvcompress.ops.call import Call
from kvcompress.ops.graph import unflatten


@torch.library.custom_op("kvcompress::blocks_attend", mutates_args=())
def blocks_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    rings: Tensor,
    ring_of: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    tensors: Sequence[Tensor],
    spec: str,
) -> tuple[Tensor, Tensor]:
    output, lse = torch.zeros_like(query), query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
    call = Call(output, query, block_table, query_starts, seq_lens, softmax_scale, lse)
    bind(unflatten(tensors, spec), pages.device).attend(call, keys, values, pages, rings, ring_of)
    return output, lse


blocks_attend.register_fake(
    lambda query, *_, **__: (torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32))
)
