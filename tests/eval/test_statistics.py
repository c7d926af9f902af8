"""Intervals, tests and verdicts: known values. `test_verdict_rates.py` has their error rates."""

from __future__ import annotations

import numpy as np
import pytest
from kvcompress_eval.statistics import (
    bootstrap_interval,
    compare,
    holm,
    independent_interval,
    mcnemar,
    mean_interval,
    paired_interval,
    verdicts,
)
from kvcompress_eval.statistics.paired import effective_counts
from scipy.optimize import minimize_scalar


def verdict_of(baseline: list[float], candidate: list[float]) -> str:
    found = compare(baseline, candidate)
    return verdicts([found.p_not_worse], [found.p_worse])[0]


def test_agreement_on_few_samples_proves_nothing() -> None:
    same = compare([1.0] * 20, [1.0] * 20)
    assert verdict_of([1.0] * 20, [1.0] * 20) == "undecided"
    assert same.delta == 0.0
    assert same.mcnemar_p == 1.0
    assert same.delta_bootstrap95 == (0.0, 0.0), "the reason why the verdict does not use it"
    assert verdict_of([1.0] * 400, [1.0] * 400) == "not worse"


def test_against_no_difference_the_test_is_mcnemars() -> None:
    # Fagerland, Lydersen and Laake 2013, table 1: 1 and 7 pairs that differ, z = -2.12, two-sided p = 0.0339.
    found = compare([1.0] * 7 + [0.0] + [1.0] * 13, [0.0] * 7 + [1.0] + [1.0] * 13)
    assert 2 * found.p_worse == pytest.approx(0.0339, abs=1e-4)
    assert found.mcnemar_p == pytest.approx(0.0703, abs=1e-4)


def test_whole_scores_of_equal_weight_are_counted_as_they_are() -> None:
    difference = np.array([1.0] * 3 + [-1.0] * 9 + [0.0] * 188)
    counts = effective_counts(difference)
    assert (float(counts.n), float(counts.gain), float(counts.loss)) == (200, 3, 9)


def test_fractions_carry_more_information_than_whole_scores() -> None:
    rng = np.random.default_rng(0)
    base = rng.choice([0.25, 0.5, 1.0], 400)
    candidate = base - rng.choice([0.25, 0.0], 400, p=[0.2, 0.8])
    found = compare(base.tolist(), candidate.tolist())
    standard = 100 * (candidate - base).std() / 20
    # A few whole differences are added, so the interval is a little wider than the normal one, never narrower.
    assert 2 * 1.96 * standard < found.delta_ci95[1] - found.delta_ci95[0] < 1.25 * 2 * 1.96 * standard


def test_weights_make_tasks_count_alike() -> None:
    base, candidate = [1.0] * 60, [0.0] * 5 + [1.0] * 5 + [1.0] * 50
    weights = [5.0] * 10 + [1.0] * 50
    found = compare(base, candidate, weights=weights)
    assert found.delta == pytest.approx(-25), "half of one task of two"
    unweighted = compare(base, candidate)
    assert found.delta_ci95[1] - found.delta_ci95[0] > unweighted.delta_ci95[1] - unweighted.delta_ci95[0]
    same = compare(base, base, weights=weights)
    assert same.delta_ci95[0] < compare(base, base).delta_ci95[0], "uneven weights are worth fewer samples"


def test_holm_steps_down_and_stops_at_the_first_failure() -> None:
    # Alone 0.02 and 0.04 would pass at 0.05; the third needs 0.05, the second 0.025, the first 0.0167.
    assert holm([0.04, 0.01, 0.02], 0.05).tolist() == [True, True, True]
    assert holm([0.04, 0.01, 0.03], 0.05).tolist() == [False, True, False]
    assert holm([0.02, 0.5, 0.5], 0.05).tolist() == [False, False, False]
    assert holm([], 0.05).tolist() == []


def test_an_unpaired_difference_is_newcombes() -> None:
    # Newcombe 1998, Statistics in Medicine 17:873, table II, method 10: 56 of 70 and 48 of 80.
    first, second = [1.0] * 48 + [0.0] * 32, [1.0] * 56 + [0.0] * 14
    assert independent_interval(first, second) == pytest.approx((0.0524, 0.3339), abs=1e-4)


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
