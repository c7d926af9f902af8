"""Caches that several layers have in common, as plain data. No torch.

Form `shared`: a group of layers keeps one latent per token, of which every layer stores an equal slice, its *stripe*.
Form `prompt`: the basis is found in each prompt when it has been read, so the checkpoint has no tensors for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

from kvcompress.codec.spec import CacheSpec, SideSpec

Share = Literal["kv", "v"]
"""Which sides of the cache the layers of a group have in common."""


@dataclass(frozen=True)
class SharedSpec:
    """One layer of a group. `v`, and `k` where keys are shared, are the bands of the layer's stripe.

    With share "v", `k` holds the bands of every head's own latent, as in form `per_head`.
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
        _check_group(self.group, self.place, self.share)
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
        _check_group(self.group, self.place, self.share)
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
            bits = 8 * self.element_bytes
            kept = rank or width
            found[name] = {"rank": kept, "bits": round(bits * kept / width, 4), "bands": [[bits, kept]]}
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


GroupSpec = SharedSpec | PromptSpec


def check_groups(layers: Sequence[CacheSpec | None]) -> None:
    """Every group is whole and its layers agree on what they share.

    Raises:
        ValueError: naming the first layer that does not fit its group.
    """
    for index, layer in enumerate(layers):
        if not isinstance(layer, GroupSpec):
            continue
        fits = index in layer.group and layer.group.index(index) == layer.place and max(layer.group) < len(layers)
        members = [layers[member] for member in layer.group] if fits else [None]
        if any(not isinstance(m, GroupSpec) or _in_common(m) != _in_common(layer) for m in members):
            raise ValueError(f"layer {index} does not fit its group {list(layer.group)}; was config.json edited?")


def _in_common(spec: GroupSpec) -> dict[str, Any]:
    """What layers of a group agree on: all but their place, and the bands of keys that are their own."""
    own = {"place": None, "k": None} if spec.share == "v" else {"place": None}
    return {**spec.to_json(), "form": spec.form, **own}


def _check_group(group: tuple[int, ...], place: int, share: str) -> None:
    if not group or any(later <= earlier for earlier, later in itertools.pairwise(group)):
        raise ValueError(f"found a group of layers {list(group)}; expected their indices in order")
    if not 0 <= place < len(group):
        raise ValueError(f"found place {place} in a group of {len(group)} layers")
    if share not in ("kv", "v"):
        raise ValueError(f"found share {share!r}; expected 'kv' or 'v'")
