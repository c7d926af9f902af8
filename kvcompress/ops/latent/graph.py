"""The operations of form `latent` as torch ops (`ops.graph`)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.codec.latent.codec import LatentCodec
from kvcompress.codec.latent.spec import LatentSpec
from kvcompress.ops.call import Call
from kvcompress.ops.latent.attention import bind
from kvcompress.ops.latent.reference import LatentOp


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
    return bind(codec, pages.device, pages.dtype)


latent_append.register_fake(lambda *_, **__: None)


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
