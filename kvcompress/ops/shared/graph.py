"""The operations of form `shared` as torch ops (`ops.graph`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.ops.graph import unflatten
from kvcompress.ops.shared.attention import bind
from kvcompress.ops.shared.call import SharedCall


@torch.library.custom_op("kvcompress::shared_store", mutates_args=("records",))
def shared_store(
    records: Tensor, side: str, latents: Tensor, weight: Tensor, slots: Tensor, tensors: Sequence[Tensor], spec: str
) -> None:
    """Of keys ("k") or values ("v")."""
    codec = unflatten(tensors, spec)
    bind(codec, records.device).store(records, getattr(codec.spec, side), latents, weight, slots)


@torch.library.custom_op("kvcompress::shared_attend", mutates_args=())
def shared_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k_records: Sequence[Tensor],
    v_records: Sequence[Tensor],
    k_tables: Sequence[Tensor],
    v_tables: Sequence[Tensor],
    query_starts: Tensor,
    seq_lens: Tensor,
    stored_lens: Tensor,
    exact_rows: Tensor,
    softmax_scale: float,
    tensors: Sequence[Tensor],
    spec: str,
) -> Tensor:
    output = torch.zeros_like(query)
    numbers = (query_starts, seq_lens, stored_lens, exact_rows)
    call = SharedCall(output, query, keys, values, k_records, v_records, k_tables, v_tables, *numbers, softmax_scale)
    bind(unflatten(tensors, spec), query.device).attend(call)
    return output


shared_store.register_fake(lambda *_, **__: None)
shared_attend.register_fake(lambda query, *_, **__: torch.empty_like(query))
