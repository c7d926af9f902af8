"""Serving figures of an engine: how many tokens its cache holds, and how fast it decodes after a long prompt."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from kvcompress_eval.engines.base import Engine

REPEATS = 3


def measure(engine: Engine, prompt: Sequence[int], *, new_tokens: int = 32) -> dict[str, Any]:
    """Decode speed after `prompt`, batch size 1: the time of `new_tokens` further tokens, prefill taken off.

    The model's end token does not stop the measurement.

    Returns:
        engine, capacity_tokens_reported, context_tokens, decode_tokens_per_s (median of three; None where noise
        outweighed the difference each time).
    """
    speeds = []
    engine.generate([prompt], 1, ignore_end=True)
    for _ in range(REPEATS):
        start = time.perf_counter()
        engine.generate([prompt], 1, ignore_end=True)
        middle = time.perf_counter()
        made = len(engine.generate([prompt], 1 + new_tokens, ignore_end=True)[0].tokens)
        seconds = (time.perf_counter() - middle) - (middle - start)
        if made > 1 and seconds > 0:
            speeds.append((made - 1) / seconds)
    return {
        "engine": engine.name,
        "capacity_tokens_reported": engine.capacity_tokens(),
        "context_tokens": len(prompt),
        "decode_tokens_per_s": statistics.median(speeds) if speeds else None,
    }
