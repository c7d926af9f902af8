"""A candidate against the baseline on the same samples, for scores that are right or wrong and for fractions.

The test and the interval are Tango's score method (1998, Statistics in Medicine 17:891): it holds its error rate where
nearly all pairs agree, as they do for a good codec. A bootstrap does not: with no differing pair it has no width.
Against a difference of zero Tango's statistic is McNemar's without continuity correction, the version that Fagerland,
Lydersen and Laake (2013, BMC Medical Research Methodology 13:91) recommend.

Tango counts pairs. Fractions (several answers per sample, F1) and samples that weigh differently become counts as in
Rao and Scott (1992, Biometrics 48:577): gains, losses and the number of pairs are divided by the design effect, the
observed variance over that of whole gains and losses. For equally weighted right-or-wrong scores it is exactly 1. One
whole gain and one whole loss are added when it is estimated (the adjustment of Bonett and Price 2012, Journal of
Educational and Behavioral Statistics 37:479), because a few small differences do not show that large ones never occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvcompress_eval.statistics.intervals import Interval, bootstrap_interval, deviation, paired_interval

ADDED = 2.0
"""Whole differences added to those observed when the design effect is estimated."""


@dataclass(frozen=True)
class Comparison:
    """A candidate against the baseline on the same samples. Scores and differences are in points (0 to 100)."""

    n: int
    delta: float
    """Mean of candidate minus baseline."""
    delta_ci95: Interval
    """Score interval of delta."""
    delta_bootstrap95: Interval
    better: int
    """Samples on which the candidate scores higher."""
    worse: int
    mcnemar_p: float
    """Exact two-sided McNemar test over the samples that differ, whatever the size of the differences."""
    p_not_worse: float
    """One-sided p value against "the loss is the margin or more"."""
    p_worse: float
    """One-sided p value against "there is no loss"."""


@dataclass(frozen=True)
class Counts:
    """Numbers of pairs, gained and lost, that carry as much information as the scores; need not be whole."""

    n: NDArray[np.float64]
    gain: NDArray[np.float64]
    loss: NDArray[np.float64]


def compare(
    baseline: Sequence[float],
    candidate: Sequence[float],
    *,
    margin: float = 1.0,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Comparison:
    """Paired comparison of per-sample scores between 0 and 1, in the same order.

    Args:
        margin: loss in points that is tolerated.
        weights: of the samples, equal by default.

    Raises:
        ValueError: nothing to compare, or samples that do not pair up.
    """
    if len(baseline) != len(candidate) or not baseline:
        raise ValueError(f"cannot compare {len(candidate)} samples with {len(baseline)} of the baseline")
    difference = np.asarray(candidate, float) - np.asarray(baseline, float)
    share = np.ones(len(difference)) if weights is None else np.asarray(weights, float) / np.mean(weights)
    counts = effective_counts(difference, share)
    low, high = paired_interval(counts.n, counts.gain, counts.loss)
    p_not_worse, p_worse = p_values(counts, margin)
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    bootstrap = bootstrap_interval(difference * share, seed=seed)
    return Comparison(
        n=len(difference),
        delta=100 * float((difference * share).mean()),
        delta_ci95=(100 * float(low), 100 * float(high)),
        delta_bootstrap95=(100 * bootstrap[0], 100 * bootstrap[1]),
        better=better,
        worse=worse,
        mcnemar_p=mcnemar(better, worse),
        p_not_worse=float(p_not_worse),
        p_worse=float(p_worse),
    )


def effective_counts(difference: ArrayLike, weights: ArrayLike = 1.0) -> Counts:
    """Counts for differences between -1 and 1, [..., n], and weights of mean 1 that broadcast to them."""
    d = np.asarray(difference, float)
    w = np.broadcast_to(np.asarray(weights, float), d.shape)
    gain, loss = (w * d.clip(min=0)).sum(-1), -(w * d.clip(max=0)).sum(-1)
    squares = ((w * d) ** 2).sum(-1) + ADDED * (w**2).mean(-1)
    design_effect = squares / (gain + loss + ADDED)
    return Counts(d.shape[-1] / design_effect, gain / design_effect, loss / design_effect)


def p_values(counts: Counts, margin: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One-sided p values against a loss of `margin` points or more, and against no loss."""
    from scipy.stats import norm

    at_margin = deviation(counts.n, counts.gain, counts.loss, -margin / 100)
    at_zero = deviation(counts.n, counts.gain, counts.loss, 0.0)
    return norm.sf(at_margin), norm.cdf(at_zero)


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p value that gains and losses are equally likely."""
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
