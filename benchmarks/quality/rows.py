"""Rows of the comparison: what a line of the table must know to be measured; the peers' lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from kvcompress.geometry import ModelGeometry

from .caches import peer_cache
from .measure import Candidate
from .peer import Peer
from .roster import LABELS, PEERS, Calibration

ELEMENT_BYTES = 2
"""Ratios are against a cache of 16 bits."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    ours: bool
    identity: str
    """Changes with whatever may change its scores, the base model, the windows and this code apart."""
    open: Callable[[], Candidate]
    """Ready to run; the first call may load weights or calibrate."""
    bytes_per_token: Callable[[int], float]
    """All layers, from the length of the context; everything that is stored counts."""
    passes: Callable[[int], int]
    """Forward passes in which a window of so many tokens is read."""


def peer_row(name: str, model: Any, config: dict[str, Any], calibration: Calibration) -> Row:
    """A peer by its name on the command line; `model` is the loaded base."""

    @cache
    def made() -> Peer:
        return PEERS[name](model, calibration)

    def stored(length: int) -> float:
        return peer_bytes(made(), config, length)

    def opened() -> Candidate:
        return Candidate(model, partial(peer_cache, made(), model.config), made().views)

    return Row(LABELS[name], False, name, opened, stored, lambda length: 1)


def peer_bytes(peer: Peer, config: dict[str, Any], length: int) -> float:
    """Bytes per token of a peer's cache of `length` tokens over all layers, those with a sliding window as they are."""
    geometry = ModelGeometry.from_config(config)
    total = 0.0
    for layer in range(geometry.num_layers):
        plain = geometry.layer_kv_bytes_per_token(layer, ELEMENT_BYTES)
        windowed = geometry.sliding_window[layer] is not None
        total += plain if windowed else plain * peer.bits(geometry.head_dim, length) / 16
    return total
