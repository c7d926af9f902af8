"""A row's figures as they stand in the result file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .measure import Scores, mean_kl, summary
from .rows import Row
from .windows import Window


def result_row(row: Row, full_bytes: int, scored: Sequence[tuple[Window, Scores]]) -> dict[str, Any]:
    """Figures by length of the windows.

    Args:
        full_bytes: bytes per token of the ordinary cache in 16 bits.
    """
    lengths = {}
    for length in sorted({len(window.tokens) for window, _ in scored}):
        here = [(window, scores) for window, scores in scored if len(window.tokens) == length]
        stored = row.bytes_per_token(length)
        by_kind: dict[str, list[Scores]] = {}
        for window, scores in here:
            by_kind.setdefault(window.kind, []).append(scores)
        lengths[str(length)] = {
            "bytes_per_token": stored,
            "ratio": full_bytes / stored,
            **summary([scores for _, scores in here]),
            "kl_by_kind": {kind: mean_kl(scores) for kind, scores in by_kind.items()},
        }
    return {"name": row.name, "ours": row.ours, "lengths": lengths}
