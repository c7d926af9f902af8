"""Verdicts on one or many comparisons, such that all of them hold together with 95 % confidence.

Two claims can be made about a candidate: "not worse" (its loss is below the margin) and "worse" (it has a loss, and
nothing shows that it stays below the margin). Each has a one-sided test at 2.5 %. A candidate's two null hypotheses
(loss at or above the margin; no loss) exclude each other, so Holm's procedure within each claim keeps the chance that
any verdict of a family is wrong at 5 %. With one comparison the verdict is what the 95 % interval of the difference
says.

Source: Holm 1979, Scandinavian Journal of Statistics 6:65; the three-way reading of the interval: Piaggio et al. 2012,
JAMA 308:2594 (CONSORT for non-inferiority).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Verdict = Literal["not worse", "worse", "undecided"]

ALPHA = 0.05
"""Chance that any verdict of a family is wrong."""


def verdicts(p_not_worse: ArrayLike, p_worse: ArrayLike, alpha: float = ALPHA) -> list[Verdict]:
    """One verdict per comparison of a family, from the p values of its two claims (`paired.Comparison`).

    A family is what is read side by side: the candidates of a report, or all rows of its table of tasks.
    """
    cleared, convicted = holm(p_not_worse, alpha / 2), holm(p_worse, alpha / 2)
    return [
        "not worse" if good else "worse" if bad else "undecided" for good, bad in zip(cleared, convicted, strict=True)
    ]


def holm(p_values: ArrayLike, alpha: float) -> NDArray[np.bool_]:
    """Which hypotheses Holm's step-down procedure rejects: the smallest p value at alpha / m, the next at
    alpha / (m - 1), and so on until one fails."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    passed = np.logical_and.accumulate(p[order] <= alpha / np.arange(len(p), 0, -1))
    rejected = np.zeros(len(p), bool)
    rejected[order] = passed
    return rejected
