"""What a simulated peer is: how it changes keys and values, and what it stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .views import Views

Side = Literal["k", "v"]


@dataclass(frozen=True)
class Peer:
    """A cache simulated by changing keys (after RoPE) and values before attention sees them."""

    stored: Callable[[Tensor, Side, int], Tensor]
    """States `[batch, KV heads, tokens, head_dim]` of all tokens up to now, the side and the layer: what decoding them
    from storage gives. Tokens that `views` never shows in this form may have any value."""
    bits: Callable[[int, int], float]
    """Bits per channel from head_dim and the length of the context, keys and values together on average; everything
    that is stored counts: scales, zero points, norms, exact windows."""
    views: Views | None = None
    """What is seen exactly; None: nothing."""
