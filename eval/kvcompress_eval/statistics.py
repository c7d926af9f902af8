"""Intervals, tests and verdicts for scores between 0 and 1, compared sample by sample with a baseline.

The verdict rests on a score interval, not on the bootstrap: where nearly all pairs agree, as they do for a good codec,
a bootstrap of the few that differ is far too sure of itself (with no differing pair it has no width at all).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["not worse", "worse", "undecided"]

Interval = tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """A candidate against the baseline on the same samples. Scores and differences are in points (0 to 100)."""

    n: int
    delta: float
    """Mean of candidate minus baseline."""
    delta_ci95: Interval
    """Score interval of delta, the one the verdict reads."""
    delta_bootstrap95: Interval
    better: int
    """Samples on which the candidate scores higher."""
    worse: int
    mcnemar_p: float
    """Exact two-sided McNemar test over the samples that differ."""
    verdict: Verdict


def compare(
    baseline: Sequence[float],
    candidate: Sequence[float],
    *,
    margin: float = 1.0,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Paired comparison of per-sample scores between 0 and 1, in the same order.

    The verdict is "not worse" if the whole interval lies above a loss of `margin` points, "worse" if the whole interval
    lies below it, and otherwise "undecided".

    Raises:
        ValueError: nothing to compare, or samples that do not pair up.
    """
    if len(baseline) != len(candidate) or not baseline:
        raise ValueError(f"cannot compare {len(candidate)} samples with {len(baseline)} of the baseline")
    difference = np.asarray(candidate, float) - np.asarray(baseline, float)
    gain, loss = float(difference.clip(min=0).sum()), float(-difference.clip(max=0).sum())
    low, high = paired_interval(len(difference), gain, loss, confidence)
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    bootstrap = bootstrap_interval(difference, seed=seed, confidence=confidence)
    return Comparison(
        n=len(difference),
        delta=100 * float(difference.mean()),
        delta_ci95=(100 * low, 100 * high),
        delta_bootstrap95=(100 * bootstrap[0], 100 * bootstrap[1]),
        better=better,
        worse=worse,
        mcnemar_p=mcnemar(better, worse),
        verdict=verdict(100 * low, 100 * high, margin),
    )


def verdict(low: float, high: float, margin: float) -> Verdict:
    """What an interval of the difference says about a loss of more than `margin`."""
    if low > -margin:
        return "not worse"
    return "worse" if high < -margin else "undecided"


def mean_interval(scores: Sequence[float], confidence: float = 0.95) -> Interval:
    """Wilson score interval of the mean of values between 0 and 1 (Wilson 1927).

    Values inside the range vary less than the Bernoulli variable of the same mean, so the interval is safe for them.
    """
    from scipy.stats import norm

    n, mean = len(scores), float(np.mean(scores))
    z2 = float(norm.ppf(0.5 + confidence / 2)) ** 2
    center = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = (z2 * (mean * (1 - mean) + z2 / (4 * n)) / n) ** 0.5 / (1 + z2 / n)
    return max(0.0, center - half), min(1.0, center + half)


def paired_interval(n: int, gain: float, loss: float, confidence: float = 0.95) -> Interval:
    """Score interval of the mean paired difference (Tango 1998, Statistics in Medicine 17:891).

    Args:
        gain: sum of the positive differences; for right-or-wrong scores, the number of pairs that turned right.
        loss: sum of the negative ones, without the sign. Sums of partial scores vary less than counts of the same
            size, so the interval is safe for them.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    z = float(norm.ppf(0.5 + confidence / 2))
    observed = (gain - loss) / n

    def deviation(delta: float) -> float:
        """Standardised distance of the observation from a true difference `delta`."""
        b = (gain + loss) - (2 * n + loss - gain) * delta
        root = (b * b + 8 * n * loss * delta * (1 - delta)) ** 0.5 if b or loss else 0.0
        lost = (b + root) / (4 * n)
        variance = max(2 * lost + delta * (1 - delta), 0.0) / n
        if variance == 0.0:
            return 0.0 if observed == delta else float(np.copysign(np.inf, observed - delta))
        return float((observed - delta) / variance**0.5)

    def bound(sign: int) -> float:
        edge = sign * (1 - 1e-9)
        if sign * observed >= abs(edge):
            return float(sign)
        found = brentq(lambda delta: np.clip(deviation(delta), -1e6, 1e6) + sign * z, observed, edge, xtol=1e-10)
        return float(found)

    return bound(-1), bound(1)


def bootstrap_interval(
    values: Sequence[float] | NDArray[np.float64],
    *,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of the mean of `values` [n] or [n, k].

    Args:
        statistic: maps resampled means [resamples] or [resamples, k] to [resamples]; the identity by default.
    """
    data = np.asarray(values, float)
    n = len(data)
    rng = np.random.default_rng(seed)
    # Means from multinomial counts: the same draw as indexing, without an array of resamples x n values.
    means = rng.multinomial(n, np.full(n, 1 / n), size=resamples) @ data / n
    found = means if statistic is None else statistic(means)
    low, high = np.quantile(found, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p value that gains and losses are equally likely."""
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
