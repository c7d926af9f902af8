"""Every row on every window, window by window: memory holds two windows' distributions, and a run can be stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from .clock import Clock, spoken
from .kept import Kept
from .measure import Candidate, Scores, compare, log_probabilities
from .rows import Row
from .windows import Window

MOST_PASSES = 200
"""A row that reads a window in more forward passes leaves it out: `xkv` reads 8 tokens at a time."""

Found = dict[str, list[tuple[Window, Scores]]]
"""By the row's name."""


def measure(
    base: Any,
    rows: Sequence[Row],
    windows: Sequence[Window],
    kept: Kept,
    resume: bool,
    after_window: Callable[[Found], None],
) -> Found:
    """Scores of every row; says after each what it found and how long the rest will take.

    Args:
        resume: take scores from `kept` where it has them.
        after_window: called with all that is found whenever a window is complete.
    """
    to_do = [(row, window) for window in windows for row in rows if row.passes(len(window.tokens)) <= MOST_PASSES]
    found: Found = {row.name: [] for row in rows}
    clock, done = Clock(), 0
    for window in windows:
        reference = None
        for row in (row for row, other in to_do if other is window):
            done += 1
            scores = kept.read(row, window) if resume else None
            if scores is None:
                if reference is None:
                    reference = log_probabilities(Candidate(base, lambda: None), window)
                candidate, began = row.open(), time.monotonic()
                scores = compare(reference, log_probabilities(candidate, window), window)
                kept.write(row, window, scores)
                clock.add(row.name, len(window.tokens), time.monotonic() - began)
                left = clock.left((row.name, len(window.tokens)) for row, window in to_do[done:])
                kl = float(scores.kl_T.double().mean())
                where = f"{window.kind}, {len(window.tokens):,} tokens"
                print(f"[{done}/{len(to_do)}] {where}: {row.name} KL {kl:.4f}; about {spoken(left)} left", flush=True)
            found[row.name].append((window, scores))
        after_window(found)
    return found
