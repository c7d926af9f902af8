"""RULER's metric `all`: the share of references found in the prediction, case ignored."""

from __future__ import annotations

import re
from collections.abc import Sequence

CONTROL = re.compile(r"[\x00-\x1f]")


def clean(prediction: str) -> str:
    """Control characters become newlines, outer whitespace goes."""
    return CONTROL.sub("\n", prediction).strip()


def score(prediction: str, references: Sequence[str]) -> float:
    """Share of references that occur in the prediction, 0 to 1."""
    text = clean(prediction).lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def task_score(scores: Sequence[float]) -> float:
    """Score of a task: 100 times the mean over samples, two decimals."""
    return round(100 * sum(scores) / len(scores), 2)
