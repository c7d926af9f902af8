"""Groups of layers that have a cache in common: what their specs agree on. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal, Protocol, cast

from kvcompress.codec.spec import CacheSpec

Share = Literal["kv", "v"]
"""Which sides of the cache the layers of a group have in common."""


class GroupSpec(CacheSpec, Protocol):
    """One layer of a group."""

    @property
    def group(self) -> tuple[int, ...]:
        """Indices of the group's layers, in order."""

    @property
    def place(self) -> int:
        """Which of them this one is, from 0."""

    @property
    def share(self) -> Share:
        """What they have in common."""


def of_group(layer: CacheSpec | None) -> GroupSpec | None:
    """The layer, if its cache is read together with others'."""
    return None if layer is None or layer.group is None else cast(GroupSpec, layer)


def check_groups(layers: Sequence[CacheSpec | None]) -> None:
    """Every group is whole and its layers agree on what they share.

    Raises:
        ValueError: naming the first layer that does not fit its group.
    """
    for index, member in enumerate(map(of_group, layers)):
        if member is None:
            continue
        group = member.group
        fits = index in group and group.index(index) == member.place and max(group) < len(layers)
        others = [of_group(layers[other]) for other in group] if fits else [None]
        if any(other is None or _in_common(other) != _in_common(member) for other in others):
            raise ValueError(f"layer {index} does not fit its group {list(group)}; was config.json edited?")


def _in_common(spec: GroupSpec) -> dict[str, Any]:
    """What layers of a group agree on: all but their place, and the bands of keys that are their own."""
    own = {"place": None, "k": None} if spec.share == "v" else {"place": None}
    return {**spec.to_json(), "form": spec.form, **own}


def check_group(group: tuple[int, ...], place: int, share: str) -> None:
    if not group or any(later <= earlier for earlier, later in itertools.pairwise(group)):
        raise ValueError(f"found a group of layers {list(group)}; expected their indices in order")
    if not 0 <= place < len(group):
        raise ValueError(f"found place {place} in a group of {len(group)} layers")
    if share not in ("kv", "v"):
        raise ValueError(f"found share {share!r}; expected 'kv' or 'v'")
