"""The cache form `latent` as plain data: a latent that the model itself computes (MLA), stored as it is. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self


@dataclass(frozen=True)
class LatentSpec:
    """One vector per token is the key of all heads, its first `rank` channels the value. No codec, nothing is lost.

    It is not among a checkpoint's codecs: its model class brings it along.
    """

    form: ClassVar[str] = "latent"
    group: ClassVar[None] = None
    num_kv_heads: ClassVar[int] = 1

    head_dim: int
    """Channels of the vector."""
    rank: int
    element_bytes: int
    """Bytes of one channel."""

    @property
    def bytes_per_token(self) -> int:
        return self.head_dim * self.element_bytes

    def summary(self) -> dict[str, Any]:
        side = {"rank": self.rank, "bits": 8 * self.element_bytes, "bands": [[8 * self.element_bytes, self.rank]]}
        return {"k": {**side, "rank": self.head_dim}, "v": side}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(*(int(data[name]) for name in ("head_dim", "rank", "element_bytes")))
