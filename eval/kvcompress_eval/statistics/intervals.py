"""Intervals of means and differences of scores between 0 and 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float]

Z95 = 1.959963984540054
"""Normal quantile of a two-sided interval of 95 %."""

Array = NDArray[np.float64]


def mean_interval(scores: Sequence[float], weights: Sequence[float] | None = None) -> Interval:
    """95 % Wilson score interval of the mean of values between 0 and 1 (Wilson 1927).

    Values inside the range vary less than the Bernoulli variable of the same mean, so the interval is safe for them.
    With weights the number of samples is Kish's effective one (1965), the square of their sum over the sum of squares.
    """
    w = np.ones(len(scores)) if weights is None else np.asarray(weights, float)
    n, mean = float(w.sum() ** 2 / (w**2).sum()), float(np.average(scores, weights=w))
    z2 = Z95**2
    center = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = (z2 * (mean * (1 - mean) + z2 / (4 * n)) / n) ** 0.5 / (1 + z2 / n)
    return max(0.0, center - half), min(1.0, center + half)


def independent_interval(
    first: Sequence[float],
    second: Sequence[float],
    weights: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Interval:
    """95 % interval of mean(second) - mean(first) for samples that do not pair up.

    Newcombe's hybrid of two Wilson intervals (1998, Statistics in Medicine 17:873, method 10).
    """
    (a, low_a, high_a), (b, low_b, high_b) = (
        (float(np.average(scores, weights=w)), *mean_interval(scores, w))
        for scores, w in zip((first, second), weights or (None, None), strict=True)
    )
    difference = b - a
    low = difference - ((b - low_b) ** 2 + (high_a - a) ** 2) ** 0.5
    high = difference + ((high_b - b) ** 2 + (a - low_a) ** 2) ** 0.5
    return low, high


def deviation(n: ArrayLike, gain: ArrayLike, loss: ArrayLike, delta: ArrayLike) -> Array:
    """Standardised distance of a paired difference from a true difference `delta` (Tango 1998).

    Args:
        n: pairs.
        gain: pairs that turned from wrong to right.
        loss: pairs that turned from right to wrong. All of them arrays that broadcast, or numbers.
    """
    pairs, gained, lost, true = np.broadcast_arrays(*(np.asarray(item, float) for item in (n, gain, loss, delta)))
    # The share of lost pairs that is most likely if the true difference is delta.
    b = (gained + lost) - (2 * pairs + lost - gained) * true
    likely = (b + np.sqrt(np.maximum(b * b + 8 * pairs * lost * true * (1 - true), 0.0))) / (4 * pairs)
    variance = np.maximum(2 * likely + true * (1 - true), 0.0) / pairs
    distance = (gained - lost) / pairs - true
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.where(variance > 0, distance / np.sqrt(variance), np.sign(distance) * np.inf)
    # No differing pair, measured against no difference.
    return np.where(distance == 0, 0.0, found)


def paired_interval(n: ArrayLike, gain: ArrayLike, loss: ArrayLike) -> tuple[Array, Array]:
    """95 % score interval of the mean paired difference: where `deviation` is that of the normal quantile."""
    pairs, gained, lost = np.broadcast_arrays(*(np.asarray(item, float) for item in (n, gain, loss)))
    observed = (gained - lost) / pairs

    def bound(sign: int) -> Array:
        inner, outer = observed, np.full(observed.shape, float(sign))
        for _ in range(50):  # bisection: the deviation falls as delta grows
            middle = (inner + outer) / 2
            inside = sign * deviation(pairs, gained, lost, middle) >= -Z95
            inner, outer = np.where(inside, middle, inner), np.where(inside, outer, middle)
        return outer

    return bound(-1), bound(1)


def bootstrap_interval(
    values: Sequence[float] | Array,
    *,
    statistic: Callable[[Array], Array] | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """95 % percentile bootstrap interval of the mean of `values` [n] or [n, k].

    Args:
        statistic: maps resampled means [resamples] or [resamples, k] to [resamples]; the identity by default.
    """
    data: Any = np.asarray(values, float)
    n = len(data)
    rng = np.random.default_rng(seed)
    # Means from multinomial counts: the same draw as indexing, without an array of resamples x n values.
    means = rng.multinomial(n, np.full(n, 1 / n), size=resamples) @ data / n
    found = means if statistic is None else statistic(means)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
