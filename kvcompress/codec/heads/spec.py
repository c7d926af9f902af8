"""The cache form `heads` as plain data: every token and KV head by itself. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from kvcompress.codec.bands import SideSpec


@dataclass(frozen=True)
class HeadsSpec:
    """Form `heads`: every token and KV head by itself, keys after RoPE, both sides with bands of their own."""

    form: ClassVar[str] = "heads"
    group: ClassVar[None] = None

    num_kv_heads: int
    head_dim: int
    k: SideSpec
    v: SideSpec

    def __post_init__(self) -> None:
        for name, side in (("k", self.k), ("v", self.v)):
            if side.rank > self.head_dim:
                raise ValueError(f"{name} keeps {side.rank} channels, more than head_dim {self.head_dim}")

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token of this layer, all heads, keys and values, gains and outliers included."""
        return self.num_kv_heads * (self.k.bytes_per_token + self.v.bytes_per_token)

    def summary(self) -> dict[str, Any]:
        return {"k": self.k.summary(self.head_dim), "v": self.v.summary(self.head_dim)}

    def cut(self, share: float, widest: int) -> HeadsSpec:
        """What is left at a smaller rank, of narrower codes: bases are nested, any first channels are a codec."""
        return HeadsSpec(self.num_kv_heads, self.head_dim, self.k.cut(share, widest), self.v.cut(share, widest))

    def to_json(self) -> dict[str, Any]:
        return {
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "k": self.k.to_json(),
            "v": self.v.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        sides = (SideSpec.from_json(data[name]) for name in ("k", "v"))
        return cls(int(data["num_kv_heads"]), int(data["head_dim"]), *sides)
