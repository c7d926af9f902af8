"""The cache form `shared` as plain data: a group of layers keeps one latent per token, of which every layer stores an
equal slice, its *stripe*. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

from kvcompress.codec.bands import SideSpec
from kvcompress.codec.groups import Share, check_group


@dataclass(frozen=True)
class SharedSpec:
    """One layer of a group. `v`, and `k` where keys are shared, are the bands of the layer's stripe.

    With share "v", `k` holds the bands of every head's own latent, as in form `heads`.
    """

    form: ClassVar[str] = "shared"

    num_kv_heads: int
    head_dim: int
    group: tuple[int, ...]
    """Indices of the group's layers, in order."""
    place: int
    """Which of them this one is, from 0."""
    share: Share
    k: SideSpec
    v: SideSpec
    sink: int = 0
    """First tokens of a text that attention sees as they were."""
    recent: int = 0
    """Newest tokens that attention sees as they were."""
    element_bytes: int = 2
    """Bytes of one channel of such a token."""

    def __post_init__(self) -> None:
        check_group(self.group, self.place, self.share)
        if self.sink < 0 or self.recent < 0:
            raise ValueError(f"found sink {self.sink} and recent {self.recent}; expected numbers of tokens")
        width = self.num_kv_heads * self.head_dim
        for name, rank, limit in (("k", self.k.rank, self.k_width), ("v", self.v.rank, width)):
            if rank > limit:
                raise ValueError(f"{name} keeps {rank} channels of {limit}")

    @property
    def k_width(self) -> int:
        """Channels that one of the layer's key latents is made of."""
        return self.head_dim if self.share == "v" else self.num_kv_heads * self.head_dim

    @property
    def k_records(self) -> int:
        """Key records per token: one per head, or one stripe."""
        return self.num_kv_heads if self.share == "v" else 1

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token of this layer: its stripes, and with share "v" its keys; gains included."""
        return self.k_records * self.k.bytes_per_token + self.v.bytes_per_token

    @property
    def bytes_per_request(self) -> int:
        """Bytes of exact tokens that every request keeps beside its latents."""
        return 2 * (self.sink + self.recent) * self.num_kv_heads * self.head_dim * self.element_bytes

    @property
    def tensor_bytes(self) -> int:
        """Bytes of this layer's codec: basis and inverse of the group's whole latent."""
        width = self.num_kv_heads * self.head_dim
        ranks = len(self.group) * (self.v.rank + (self.k.rank if self.share == "kv" else 0))
        return 4 * (2 * width * ranks + (2 * width * self.k.rank if self.share == "v" else 0) + 2 * width + ranks)

    def summary(self) -> dict[str, Any]:
        width = self.num_kv_heads * self.head_dim
        shared: dict[str, Any] = {"group": list(self.group)}
        sides = {"k": self.k.summary(self.k_width), "v": self.v.summary(width) | shared}
        if self.share == "kv":
            sides["k"] |= shared
        return {**sides, **({"sink": self.sink, "recent": self.recent} if self.sink or self.recent else {})}

    def to_json(self) -> dict[str, Any]:
        return {
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "group": list(self.group),
            "place": self.place,
            "share": self.share,
            "k": self.k.to_json(),
            "v": self.v.to_json(),
            "sink": self.sink,
            "recent": self.recent,
            "element_bytes": self.element_bytes,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        k, v = (SideSpec.from_json(data[name]) for name in ("k", "v"))
        return cls(
            int(data["num_kv_heads"]),
            int(data["head_dim"]),
            tuple(int(index) for index in data["group"]),
            int(data["place"]),
            cast(Share, data["share"]),
            k,
            v,
            int(data["sink"]),
            int(data["recent"]),
            int(data["element_bytes"]),
        )
