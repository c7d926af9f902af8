"""Intervals and verdicts: known values, and error rates by simulation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from kvcompress_eval.statistics import (
    bootstrap_interval,
    compare,
    mcnemar,
    mean_interval,
    paired_interval,
    verdict,
)
from scipy.optimize import minimize_scalar

TRIALS = 1000


def simulate(n: int, loss: float, gain: float, seed: int) -> Counter[str]:
    """Verdicts over pairs of right-or-wrong answers that turn wrong with probability `loss`, right with `gain`."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n, [gain, loss, 1 - gain - loss], size=TRIALS)
    found: Counter[str] = Counter()
    for gained, lost, _ in drawn.tolist():
        low, high = paired_interval(n, gained, lost)
        found[verdict(100 * low, 100 * high, 1.0)] += 1
    return found


@pytest.mark.parametrize(("n", "noise"), [(100, 0.02), (200, 0.05), (200, 0.15), (500, 0.02), (2000, 0.1)])
def test_equal_models_are_rarely_called_worse(n: int, noise: float) -> None:
    assert simulate(n, noise, noise, seed=n)["worse"] <= 0.05 * TRIALS


@pytest.mark.parametrize(("n", "gain"), [(100, 0.0), (300, 0.0), (500, 0.0), (500, 0.05), (2000, 0.0), (2000, 0.05)])
def test_a_loss_at_the_margin_is_rarely_cleared_or_convicted(n: int, gain: float) -> None:
    found = simulate(n, gain + 0.01, gain, seed=n)
    assert found["not worse"] <= 0.05 * TRIALS
    assert found["worse"] <= 0.05 * TRIALS


def test_a_planted_loss_of_five_points_is_found() -> None:
    assert simulate(200, 0.05, 0.0, seed=3)["worse"] >= 0.9 * TRIALS


def test_equal_models_are_cleared_with_enough_samples() -> None:
    assert simulate(3000, 0.005, 0.005, seed=4)["not worse"] >= 0.9 * TRIALS


def test_full_comparison_convicts_partial_scores_too() -> None:
    rng = np.random.default_rng(0)
    found = Counter()
    for _ in range(50):
        base = rng.choice([0.5, 0.75, 1.0], size=200)
        candidate = base - np.where(rng.random(200) < 0.2, 0.25, 0.0)
        found[compare(base.tolist(), candidate.tolist()).verdict] += 1
    assert found["worse"] >= 45


def test_agreement_on_few_samples_proves_nothing() -> None:
    same = compare([1.0] * 20, [1.0] * 20)
    assert same.verdict == "undecided"
    assert same.delta == 0.0
    assert same.mcnemar_p == 1.0
    assert same.delta_bootstrap95 == (0.0, 0.0), "the reason why the verdict does not use it"
    assert compare([1.0] * 400, [1.0] * 400).verdict == "not worse"


def likelihood_ratio_free_deviation(n: int, gain: float, loss: float, delta: float) -> float:
    """Tango's statistic with the constrained maximum found numerically."""
    rest = n - gain - loss

    def cost(lost: float) -> float:
        gained = lost + delta
        return -(loss * np.log(lost) + gain * np.log(gained) + rest * np.log(1 - lost - gained))

    lower, upper = max(0.0, -delta), (1 - delta) / 2
    lost = minimize_scalar(cost, bounds=(lower + 1e-12, upper - 1e-12), method="bounded", options={"xatol": 1e-13}).x
    return ((gain - loss) / n - delta) / ((2 * lost + delta - delta**2) / n) ** 0.5


@pytest.mark.parametrize(("n", "gain", "loss"), [(200, 3, 9), (50, 1, 7), (1000, 40, 20), (120, 2.5, 6.75)])
def test_interval_ends_where_the_score_statistic_is_196(n: int, gain: float, loss: float) -> None:
    low, high = paired_interval(n, gain, loss)
    assert likelihood_ratio_free_deviation(n, gain, loss, low) == pytest.approx(1.96, abs=2e-3)
    assert likelihood_ratio_free_deviation(n, gain, loss, high) == pytest.approx(-1.96, abs=2e-3)


def test_interval_at_the_edges() -> None:
    low, high = paired_interval(200, 0, 0)
    assert high == pytest.approx(-low)
    assert low == pytest.approx(-(1.959964**2) / (200 + 1.959964**2), abs=1e-6)
    assert paired_interval(50, 0, 50)[0] == -1.0
    assert paired_interval(50, 50, 0)[1] == 1.0
    low, high = paired_interval(100, 2, 7)
    assert paired_interval(100, 7, 2) == pytest.approx((-high, -low), abs=1e-8)


def test_mean_interval_is_wilson() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263.
    assert mean_interval([1.0] * 81 + [0.0] * 182) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert mean_interval([1.0] * 20)[1] == 1.0
    assert mean_interval([1.0] * 20)[0] < 0.85


def test_bootstrap_is_seeded_and_near_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(values, seed=5)
    assert (low, high) == bootstrap_interval(values, seed=5)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    ratio = bootstrap_interval(np.stack([values, np.ones(400)], 1), statistic=lambda m: m[:, 0] / m[:, 1], seed=5)
    assert ratio == pytest.approx((low, high))


def test_mcnemar_is_the_exact_binomial() -> None:
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(3, 3) == 1.0


def test_unpaired_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot compare 1 samples with 2"):
        compare([1.0, 0.0], [1.0])
