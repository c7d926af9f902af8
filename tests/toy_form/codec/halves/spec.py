"""The cache form `halves` as plain data: keys and values as IEEE halves, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self


@dataclass(frozen=True)
class HalvesSpec:
    form: ClassVar[str] = "halves"
    group: ClassVar[None] = None

    num_kv_heads: int
    head_dim: int

    @property
    def bytes_per_token(self) -> int:
        return 2 * 2 * self.num_kv_heads * self.head_dim

    def summary(self) -> dict[str, Any]:
        side = {"rank": self.head_dim, "bits": 16.0, "bands": [[16, self.head_dim]]}
        return {"k": side, "v": side}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(int(data["num_kv_heads"]), int(data["head_dim"]))
