"""The operator's line: what one token takes in the cache, and what it would take without a codec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class LayerReport:
    """Bytes per token of one layer on this rank; `uncompressed` says why a layer has no codec. A running request takes
    `request_bytes` besides, however long it is.
    """

    bytes_per_token: int
    full_bytes_per_token: int
    uncompressed: str | None = None
    request_bytes: int = 0


def describe(layers: Mapping[int, LayerReport], dtype: str) -> str:
    """One line for the log."""
    stored, full = totals(layers)
    sizes = _by_value({index: str(layer.bytes_per_token) for index, layer in layers.items()})
    line = (
        f"KV cache {stored} bytes per token, {full / stored:.2f}x smaller than {full} in {dtype}; "
        f"bytes per token and layer: {sizes}"
    )
    per_request = sum(layer.request_bytes for layer in layers.values())
    if per_request:
        line += f"; newest tokens uncompressed: {per_request} bytes per running request"
    reasons = _by_value({index: layer.uncompressed for index, layer in layers.items() if layer.uncompressed})
    return f"{line}; uncompressed layers: {reasons}" if reasons else line


KERNELS, KERNELS_ALONE, TORCH = "CUDA kernels", "CUDA kernels outside of full graphs", "torch code (slower)"
"""What attends a layer on a GPU."""


def describe_attention(layers: Mapping[int, str]) -> str:
    """One line for the log of a GPU."""
    return f"attention by layer: {_by_value(dict(layers))}"


def totals(layers: Mapping[int, LayerReport]) -> tuple[int, int]:
    """Bytes per token of all layers, as they are and as they would be without a codec."""
    stored = sum(layer.bytes_per_token for layer in layers.values())
    return stored, sum(layer.full_bytes_per_token for layer in layers.values())


def describe_capacity(layers: Mapping[int, LayerReport], tokens: int) -> str:
    """One line for the log: what fits into the cache, and what would without a codec."""
    stored, full = totals(layers)
    return f"room for {tokens:,} tokens; without compression for {int(tokens * stored / full):,}"


def _by_value(values: Mapping[int, str]) -> str:
    """`0-2: a, 3: b`: runs of layers that share a value."""
    runs: list[str] = []
    # Neighbours with the same value have the same difference between index and position.
    numbered = [(index, position, value) for position, (index, value) in enumerate(sorted(values.items()))]
    for (value, _), run in groupby(numbered, key=lambda item: (item[2], item[0] - item[1])):
        indices = [index for index, _, _ in run]
        name = str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
        runs.append(f"{name}: {value}")
    return ", ".join(runs)
