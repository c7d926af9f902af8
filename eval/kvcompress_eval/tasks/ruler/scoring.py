"""RULER's two metrics, both by substrings with case ignored: `all` for retrieval, `part` for questions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Metric = Literal["all", "part"]

CONTROL = re.compile(r"[\x00-\x1f]")


def clean(prediction: str) -> str:
    """Control characters become newlines, outer whitespace goes."""
    return CONTROL.sub("\n", prediction).strip()


def score(prediction: str, references: Sequence[str], metric: Metric = "all") -> float:
    """Score of one sample, 0 to 1: the share of references that occur in the prediction, or whether one does."""
    text = clean(prediction).lower()
    found = [reference.lower() in text for reference in references]
    return float(any(found)) if metric == "part" else sum(found) / len(found)


def task_score(scores: Sequence[float]) -> float:
    """Score of a task: the mean over samples times 100, two decimals, rounded as the benchmark rounds."""
    return round(sum(scores) / len(scores) * 100, 2)
