"""What a user has without kvcompress: per-token integer caches, to compare with. transformers engine only.

Each token and head is quantized by itself, asymmetrically between its smallest and largest channel (the scheme of
FlexGen and of most integer KV caches, with one group per head): bytes per token and head are
`bits * head_dim / 8 + 4`, scale and zero point being IEEE halves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

BITS = {"int8": 8, "int4": 4, "int2": 2}
"""Names of the caches and their code widths."""


def cache_factory(name: str, num_layers: int) -> Callable[[], Cache]:
    """A function that makes an empty cache for one sequence.

    Raises:
        ValueError: no such cache.
    """
    if name not in BITS:
        raise ValueError(f"unknown cache {name!r}; expected one of {', '.join(BITS)}")
    return lambda: Cache(layers=[IntegerLayer(BITS[name]) for _ in range(num_layers)])


def bytes_per_token(name: str, num_layers: int, num_kv_heads: int, head_dim: int) -> int:
    """Bytes of one token in all layers, keys and values, scales and zero points included."""
    return 2 * num_layers * num_kv_heads * (BITS[name] * head_dim // 8 + 4)


class IntegerLayer(DynamicLayer):  # type: ignore[misc]
    """Holds what a per-token integer cache gives back; the integers themselves are of no use to a comparison."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states `[batch, heads, tokens, head_dim]`; return every token's as read back."""
        rounded = (round_trip(states, self.bits) for states in (key_states, value_states))
        keys, values = super().update(*rounded, *args, **kwargs)
        return keys, values


def round_trip(states_BHTD: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize each vector along the last dimension."""
    x = states_BHTD.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp_min(torch.finfo(torch.float16).tiny)
    zero = low.half().float()
    codes = ((x - zero) / scale).round().clamp(0, 2**bits - 1)
    rounded: Tensor = (codes * scale + zero).to(states_BHTD.dtype)
    return rounded
