"""One attention layer of this process that keeps a compressed cache: what canary and sentinel look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvcompress.codec.canary import Statement
from kvcompress.codec.contract import CacheCodec


@dataclass(frozen=True)
class Served:
    """`codec` is that of this rank's KV heads, on the CPU; None for a latent that the model itself computes."""

    index: int
    layer: Any
    codec: CacheCodec | None
    stated: Statement | None = None
    """What the codec states of this rank's heads."""

    @property
    def name(self) -> str:
        """For messages."""
        return f"layer {self.index} ({self.layer.layer_name})"

    @property
    def group(self) -> tuple[int, ...]:
        """The layers it is decoded with, itself included."""
        return (None if self.codec is None else self.codec.spec.group) or (self.index,)

    @property
    def cache(self) -> Tensor:
        """`[blocks, KV heads, tokens per block, content]`, once vLLM has bound it."""
        cache: Tensor = self.layer.kv_cache
        return cache

    @property
    def ring(self) -> Any:
        """The layer's `gear_cache.Ring`; None in forms without one."""
        return getattr(self.layer.impl, "ring", None)
