"""The cache form `prompt` as plain data: the basis is found in each prompt when it has been read. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

from kvcompress.codec.bands import Band, summary
from kvcompress.codec.groups import Share, check_group


@dataclass(frozen=True)
class PromptSpec:
    """One layer of a group whose cache is factored prompt by prompt: tokens x rank, and rank x channels per layer.

    Factors have the dtype of the model's activations, `element_bytes` a number. A rank of the group is `rank` times
    its layers. Rank 0 for keys: they stay as they are (share "v").
    """

    form: ClassVar[str] = "prompt"

    num_kv_heads: int
    head_dim: int
    group: tuple[int, ...]
    place: int
    share: Share
    k_rank: int
    v_rank: int
    element_bytes: int
    sink: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        check_group(self.group, self.place, self.share)
        width = self.num_kv_heads * self.head_dim
        if not 0 < self.v_rank <= width or not 0 <= self.k_rank <= width or (self.k_rank == 0) != (self.share == "v"):
            raise ValueError(f"found ranks {self.k_rank} and {self.v_rank} of {width} with share {self.share}")
        if self.sink < 0 or self.recent < 0:
            raise ValueError(f"found sink {self.sink} and recent {self.recent}; expected numbers of tokens")

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token of the prompt: this layer's part of the factor that the group has in common.

        Generated tokens are kept whole.
        """
        keys = self.num_kv_heads * self.head_dim if self.share == "v" else self.k_rank
        return self.element_bytes * (keys + self.v_rank)

    @property
    def bytes_per_request(self) -> int:
        """Bytes of this layer's own factors and of its exact tokens, once per request."""
        width = self.num_kv_heads * self.head_dim
        factors = len(self.group) * (self.k_rank + self.v_rank) * width
        return self.element_bytes * (factors + 2 * (self.sink + self.recent) * width)

    @property
    def tensor_bytes(self) -> int:
        return 0

    def summary(self) -> dict[str, Any]:
        width = self.num_kv_heads * self.head_dim
        found = {}
        for name, rank in (("k", self.k_rank), ("v", self.v_rank)):
            found[name] = summary([Band(8 * self.element_bytes, rank or width)], width)
            if rank:
                found[name]["group"] = list(self.group)
        return {**found, "basis": "prompt", "bytes_per_request": self.bytes_per_request}

    def to_json(self) -> dict[str, Any]:
        return {
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "group": list(self.group),
            "place": self.place,
            "share": self.share,
            "k_rank": self.k_rank,
            "v_rank": self.v_rank,
            "element_bytes": self.element_bytes,
            "sink": self.sink,
            "recent": self.recent,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(
            num_kv_heads=int(data["num_kv_heads"]),
            head_dim=int(data["head_dim"]),
            group=tuple(int(index) for index in data["group"]),
            place=int(data["place"]),
            share=cast(Share, data["share"]),
            k_rank=int(data["k_rank"]),
            v_rank=int(data["v_rank"]),
            element_bytes=int(data["element_bytes"]),
            sink=int(data["sink"]),
            recent=int(data["recent"]),
        )
