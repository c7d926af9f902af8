"""One attention layer of this process that keeps a compressed cache: what canary and sentinel look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvcompress.codec.canary import Statement
from kvcompress.codec.contract import CacheCodec
from kvcompress.serving.vllm import compat


@dataclass(frozen=True)
class Served:
    """`codec` is that of this rank's KV heads, on the CPU."""

    index: int
    layer: compat.Layer
    codec: CacheCodec
    stated: Statement | None = None
    """What the codec states of this rank's heads."""

    @property
    def name(self) -> str:
        """For messages."""
        return f"layer {self.index} ({self.layer.name})"

    @property
    def group(self) -> tuple[int, ...]:
        """The layers it is decoded with, itself included."""
        return self.codec.spec.group or (self.index,)

    @property
    def ring(self) -> Any:
        """The cache that the layer has beside its pages; None in forms without one."""
        return getattr(self.layer.impl, "ring", None)
