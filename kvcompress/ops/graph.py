"""The operations as torch ops, for graphs: `torch.ops.kvcompress.heads_attend` and its like.

Importing this module registers them. Ops take no objects, so a codec goes in as its tensors and its spec in JSON
(`flatten`). Each does what the method of that name does which `ops.<form>.attention.bind` gives for the device of the
cache, and allocates what it returns.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcompress.codec.bands import SideSpec
from kvcompress.codec.latent.codec import LatentCodec
from kvcompress.codec.latent.spec import LatentSpec
from kvcompress.forms import FORMS
from kvcompress.ops.blocks.attention import bind as bind_blocks
from kvcompress.ops.call import Call
from kvcompress.ops.heads.attention import bind as bind_heads
from kvcompress.ops.latent.attention import bind as bind_latent
from kvcompress.ops.latent.reference import LatentOp
from kvcompress.ops.shared.attention import bind as bind_shared
from kvcompress.ops.shared.call import SharedCall


def flatten(codec: Any) -> tuple[list[Tensor], str]:
    """A codec as ops take it."""
    named = codec.tensors()
    return list(named.values()), json.dumps({"form": codec.spec.form, "tensors": [*named], **codec.spec.to_json()})


def unflatten(tensors: Sequence[Tensor], spec: str) -> Any:
    """Inverse of `flatten`."""
    data = json.loads(spec)
    form, named = FORMS[data["form"]], dict(zip(data["tensors"], tensors, strict=True))
    return form.codec.from_tensors(form.spec.from_json(data), lambda name, *_, **__: named[name])


@torch.library.custom_op("kvcompress::heads_append", mutates_args=("pages",))
def heads_append(
    pages: Tensor, keys: Tensor, values: Tensor, slots: Tensor, tensors: Sequence[Tensor], spec: str
) -> None:
    bind_heads(unflatten(tensors, spec), pages.device).append(pages, keys, values, slots)


@torch.library.custom_op("kvcompress::heads_compress", mutates_args=("pages",))
def heads_compress(
    pages: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, tensors: Sequence[Tensor], spec: str
) -> None:
    bind_heads(unflatten(tensors, spec), pages.device).compress(pages, keys, values, blocks)


@torch.library.custom_op("kvcompress::heads_read", mutates_args=())
def heads_read(
    pages: Tensor,
    block_table: Tensor,
    length: int,
    tensors: Sequence[Tensor],
    spec: str,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    return bind_heads(unflatten(tensors, spec), pages.device).read(pages, block_table, length, dtype)


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
    bind_heads(unflatten(tensors, spec), pages.device).attend(call, pages)
    return output, lse


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
    bind_blocks(unflatten(tensors, spec), pages.device).attend(call, keys, values, pages, rings, ring_of)
    return output, lse


@torch.library.custom_op("kvcompress::shared_store", mutates_args=("records",))
def shared_store(
    records: Tensor, side: str, latents: Tensor, weight: Tensor, slots: Tensor, tensors: Sequence[Tensor], spec: str
) -> None:
    """Of keys ("k") or values ("v")."""
    codec = unflatten(tensors, spec)
    bind_shared(codec, records.device).store(records, getattr(codec.spec, side), latents, weight, slots)


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
    bind_shared(unflatten(tensors, spec), query.device).attend(call)
    return output


@torch.library.custom_op("kvcompress::latent_append", mutates_args=("pages",))
def latent_append(pages: Tensor, keys: Tensor, slots: Tensor, rank: int) -> None:
    _latent(pages, rank).append(pages, keys, slots)


@torch.library.custom_op("kvcompress::latent_attend", mutates_args=())
def latent_attend(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    rank: int,
    softmax_scale: float,
    max_query_len: int | None = None,
) -> Tensor:
    """The output's channels are the first `rank`."""
    output = query.new_zeros(*query.shape[:2], rank)
    numbers = (block_table, query_starts, seq_lens, softmax_scale)
    _latent(pages, rank).attend(Call(output, query, *numbers, max_query_len=max_query_len), pages)
    return output


def _latent(pages: Tensor, rank: int) -> LatentOp:
    codec = LatentCodec(LatentSpec(pages.shape[2], rank, pages.element_size()))
    return bind_latent(codec, pages.device, pages.dtype)


for _op in (heads_append, heads_compress, shared_store, latent_append):
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


for _op in (heads_attend, blocks_attend):
    _op.register_fake(
        lambda query, *_, **__: (torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32))
    )
shared_attend.register_fake(lambda query, *_, **__: torch.empty_like(query))


@latent_attend.register_fake
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
