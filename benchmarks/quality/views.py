"""Attention where a query sees some tokens exactly and the others as they are stored, in one pass over a window.

Methods with an exact window replace a token's exact states by stored ones as newer tokens come. Fed token by token, the
query at position t meets the cache of that moment. Fed as a whole, every query has to meet the cache of *its* moment:
so the layer hands over both forms of all tokens, and attention picks per query and token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = "benchmark_views"
_QUERIES_AT_ONCE = 256

Rule = Callable[[Tensor, Tensor], Tensor]
"""From positions of queries `[T, 1]` and tokens `[1, S]`: whether the query sees the token exactly `[T, S]`."""


@dataclass(frozen=True)
class Views:
    """Which tokens a query sees exactly, for keys and for values."""

    keys: Rule
    values: Rule


def attend(
    query_BHTD: Tensor,
    keys: tuple[Tensor, Tensor],
    values: tuple[Tensor, Tensor],
    mask_BHTS: Tensor,
    views: Views,
    scale: float,
) -> Tensor:
    """Softmax attention over stored and exact forms.

    Args:
        query_BHTD: the newest T of the S tokens.
        keys: stored and exact, each `[batch, KV heads, S, head_dim]`; values likewise.
        mask_BHTS: added to the scores; forbids what a query must not see.

    Returns:
        `[batch, T, query heads, head_dim]`.
    """
    batch, heads, tokens, dim = query_BHTD.shape
    kv_heads, length = keys[0].shape[1:3]
    at_S = torch.arange(length, device=query_BHTD.device)[None]
    parts = []
    for start in range(0, tokens, _QUERIES_AT_ONCE):
        query = query_BHTD[:, :, start : start + _QUERIES_AT_ONCE] * scale
        size = query.shape[2]
        at_T = torch.arange(length - tokens + start, length - tokens + start + size, device=query.device)[:, None]
        grouped = query.reshape(batch, kv_heads, -1, dim)  # query heads of a KV head stand together

        def select(rule: Rule, forms: tuple[Tensor, Tensor], at_T: Tensor = at_T) -> Tensor:
            return torch.where(rule(at_T, at_S), forms[1], forms[0])

        stored, exact = ((grouped @ form.mT).view(batch, heads, size, length) for form in keys)
        scores = select(views.keys, (stored, exact)) + mask_BHTS[:, :, start : start + size]
        weights = scores.softmax(-1)
        of_exact = select(views.values, (torch.zeros_like(weights), weights))
        mixed = of_exact.reshape(batch, kv_heads, -1, length) @ values[1]
        mixed += (weights - of_exact).reshape(batch, kv_heads, -1, length) @ values[0]
        parts.append(mixed.view(batch, heads, size, dim))
    return torch.cat(parts, 2).transpose(1, 2)


@contextmanager
def views_of(model: Any, views: Views | None) -> Iterator[None]:
    """While it lasts, the model attends through `attend`; layers without two forms attend as ever."""
    if views is None:
        yield
        return
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        if key.shape[-2] == attention_mask.shape[-1]:  # an ordinary cache, as of layers with a sliding window
            keys, values = (key, key), (value, value)
        else:
            keys, values = key.chunk(2, dim=-2), value.chunk(2, dim=-2)
        return attend(query, keys, values, attention_mask, views, float(options["scaling"])), None

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, eager_mask)
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
