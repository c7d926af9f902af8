"""What a layer must answer: the codec's round trip and exact attention in float32, sharing no code with the kernels.

A form of cache says which rows a query sees: stored ones as the codec gives them back, and which tokens as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress.codec.contract import CacheCodec


class Inputs(NamedTuple):
    """What one layer's attention is given: post-RoPE queries and keys, and values, of one text."""

    query_THD: Tensor
    key_THD: Tensor
    value_THD: Tensor


class Rows(NamedTuple):
    """Keys and values in the order of tokens: as stored and as they are."""

    stored: tuple[Tensor, Tensor]
    exact: tuple[Tensor, Tensor]


def rows(codecs: Sequence[CacheCodec], inputs: Sequence[Inputs]) -> list[Rows]:
    """Of layers that are decoded together."""
    exact = [(layer.key_THD.float(), layer.value_THD.float()) for layer in inputs]
    positions_T = torch.arange(inputs[0].key_THD.shape[0], device=inputs[0].key_THD.device)
    keys, values = [layer.key_THD for layer in inputs], [layer.value_THD for layer in inputs]
    stored = codecs[0].round_trip(codecs, keys, values, positions_T)
    return [Rows(read, given) for read, given in zip(stored, exact, strict=True)]


def answer(codec: CacheCodec, layer: Rows, query_QHD: Tensor, start: int, scale: float) -> Tensor:
    """Attention of a step's queries, which begin at position `start`: float32 `[queries, heads, value channels]`."""
    queries = query_QHD.shape[0]
    stop, device = start + queries, query_QHD.device
    query_Q1, token_1T = torch.arange(start, stop, device=device)[:, None], torch.arange(stop, device=device)[None]
    before = token_1T <= query_Q1
    as_stored = [codec.as_stored(side, query_Q1, token_1T, start) for side in ("k", "v")]
    (keys, exact_keys), (values, exact_values) = (
        (stored[:stop], exact[:stop]) for stored, exact in zip(layer.stored, layer.exact, strict=True)
    )
    group = query_QHD.shape[1] // keys.shape[1]
    query_QJGD = query_QHD.float().unflatten(1, (-1, group))
    scores = torch.where(
        as_stored[0],
        torch.einsum("qjgd,tjd->jgqt", query_QJGD, keys),
        torch.einsum("qjgd,tjd->jgqt", query_QJGD, exact_keys),
    )
    weights = (scores * scale).masked_fill(~before, -torch.inf).softmax(-1)
    mixed = torch.einsum("jgqt,tjd->qjgd", weights * as_stored[1], values)
    mixed += torch.einsum("jgqt,tjd->qjgd", weights * ~as_stored[1], exact_values)
    return mixed.flatten(1, 2)
