"""KIVI: keys per channel over groups of tokens, values per token, a residual window exact.

Source: arXiv 2402.02750 and its published code's settings for 2 bits: groups of 32, residual of 128.

Simulated: keys after RoPE, min-max per channel over 32 tokens; values min-max per token over 32 channels; scale and
zero point 16 bits each. When the query at position t runs, keys are stored in whole residuals (the first
`t // 128 * 128` tokens), and of the values all but the newest 128 before the query; that is the published cache at
every decoding step. Not simulated: its prefill, which attends the whole prompt exactly before storing it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .integers import group_size, min_max
from .peer import Peer, Side
from .views import Views

GROUP, RESIDUAL = 32, 128


def kivi(bits: int, group: int = GROUP, residual: int = RESIDUAL) -> Peer:
    """KIVI in `bits`; `residual` is a multiple of `group`."""

    def stored(states: Tensor, side: Side, layer: int) -> Tensor:
        if side == "v":
            return min_max(states, bits, group_size(states.shape[-1], group))
        whole = states.shape[-2] // group * group
        grouped = min_max(states[..., :whole, :].mT, bits, group).mT
        return torch.cat([grouped, states[..., whole:, :]], dim=-2)

    def keys_exact(query: Tensor, token: Tensor) -> Tensor:
        return token >= query // residual * residual

    def values_exact(query: Tensor, token: Tensor) -> Tensor:
        return token >= query - residual

    def mean_bits(head_dim: int, length: int) -> float:
        # Seen by a query: itself, 0 to residual - 1 older exact keys (half on average) and `residual` older values.
        exact_k, exact_v = min(length, (residual + 1) / 2), min(length, residual + 1)
        share_k, share_v = exact_k / length, exact_v / length
        keys = 16 * share_k + (bits + 32 / group) * (1 - share_k)
        values = 16 * share_v + (bits + 32 / group_size(head_dim, group)) * (1 - share_v)
        return (keys + values) / 2

    return Peer(stored, mean_bits, Views(keys_exact, values_exact))
