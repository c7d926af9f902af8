"""How often verdicts are wrong, and how often a loss is found: 1,000 simulated comparisons per line. `-s` prints them.

Agreement between models: on the reference model, recipes at a quarter of the cache change 1 to 4 % of the answers, and
one at an eighth that loses 10 points turns 32 answers of 120 worse and 2 better. A planted loss of 5 points therefore
comes with 0.3 % of answers that turn better. With 0.5 % it would be found in 88 %: McNemar's test, which this is for
right-or-wrong answers, is the most powerful unbiased one, so that more noise takes more samples, not another test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from kvcompress_eval.statistics import ALPHA, compare, independent_interval, verdicts
from kvcompress_eval.statistics.paired import Counts, effective_counts, p_values
from numpy.typing import NDArray

TRIALS = 1000
ALLOWED = 0.05

Differences = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Differences]
"""Paired differences [TRIALS, n] of a generator and n."""


def right_or_wrong(better: float, worse: float) -> Draw:
    """Answers that turn right or wrong with these probabilities."""

    def draw(rng: np.random.Generator, n: int) -> Differences:
        drawn = rng.random((TRIALS, n), np.float32)
        return (drawn < better).astype(float) - (drawn >= 1 - worse)

    return draw


def answers(base: float, better: float, worse: float, of: int = 4) -> Draw:
    """Shares of `of` answers found. `better`: a missed answer is found; `worse`: a found one is missed."""

    def draw(rng: np.random.Generator, n: int) -> Differences:
        found = rng.random((TRIALS, n, of)) < base
        moved = rng.random((TRIALS, n, of)) < np.where(found, worse, better)
        return (np.where(found, -1.0, 1.0) * moved).mean(-1)

    return draw


def f1(changed: float, spread: float, shift: float = 0.0, zeroed: float = 0.0) -> Draw:
    """F1-like fractions: a share of answers changes by a normal amount, another share scores nothing any more."""

    def draw(rng: np.random.Generator, n: int) -> Differences:
        base = rng.beta(4, 2, (TRIALS, n))
        # Symmetric around the mean of the base scores, so that cutting at 0 and 1 shifts nothing.
        moved = rng.normal(0, spread, (TRIALS, n)).clip(-np.minimum(base, 1 - base), np.minimum(base, 1 - base))
        change = np.where(rng.random((TRIALS, n)) < changed, moved + shift, 0.0)
        return np.where(rng.random((TRIALS, n)) < zeroed, -base, change).clip(-1, 1)

    return draw


def rare_failures(failing: float, noisy: float) -> Draw:
    """Whole samples fail, hidden among small changes of both signs: the worst case for an estimated variance."""

    def draw(rng: np.random.Generator, n: int) -> Differences:
        small = np.where(rng.random((TRIALS, n)) < noisy, rng.choice([-0.25, 0.25], (TRIALS, n)), 0.0)
        return np.where(rng.random((TRIALS, n)) < failing, -1.0, small)

    return draw


@dataclass(frozen=True)
class Rates:
    delta: float
    not_worse: float
    worse: float


def rates(draw: Draw, n: int, what: str, margin: float = 1.0) -> Rates:
    """Shares of the verdicts over single comparisons."""
    differences = draw(np.random.default_rng([n, TRIALS]), n)
    p_not_worse, p_worse = p_values(effective_counts(differences), margin)
    cleared = p_not_worse <= ALPHA / 2
    found = Rates(
        100 * float(differences.mean()), float(cleared.mean()), float(((p_worse <= ALPHA / 2) & ~cleared).mean())
    )
    print(
        f"{what:42} n {n:5}  mean {found.delta:+6.2f}  not worse {found.not_worse:6.1%}  worse {found.worse:6.1%}"
        f"  undecided {1 - found.not_worse - found.worse:6.1%}"
    )
    return found


SAMPLES = (50, 100, 200, 500)


@pytest.mark.parametrize("n", SAMPLES)
def test_no_loss_is_rarely_called_worse(n: int) -> None:
    for noise in (0.001, 0.005, 0.01, 0.02, 0.05, 0.15):
        assert rates(right_or_wrong(noise, noise), n, f"A/A, {noise:.1%} turn each way").worse <= ALLOWED
    for base in (0.9, 0.5):
        same = answers(base, 0.02 * base / (1 - base), 0.02)
        assert rates(same, n, f"A/A, 4 answers, {base:.0%} found").worse <= ALLOWED
    assert rates(f1(0.3, 0.2), n, "A/A, F1, 30 % change").worse <= ALLOWED


@pytest.mark.parametrize("n", SAMPLES)
@pytest.mark.parametrize("loss", [0.01, 0.02])
def test_a_loss_at_or_beyond_the_margin_is_rarely_cleared(n: int, loss: float) -> None:
    for gain in (0.0, 0.002, 0.01, 0.05):
        draw = right_or_wrong(gain, gain + loss)
        assert rates(draw, n, f"loss {loss:.0%}, {gain:.1%} turn better").not_worse <= ALLOWED
    assert rates(answers(1.0, 0.0, loss), n, f"loss {loss:.0%}, 4 answers").not_worse <= ALLOWED
    draw = answers(0.9, 0.05, (loss + 0.005) / 0.9)
    assert rates(draw, n, f"loss {loss:.0%}, 4 answers, 90 % found").not_worse <= ALLOWED
    draw = f1(0.3, 0.2, -loss / 0.3)
    assert rates(draw, n, f"loss {loss:.0%}, F1, 30 % change").not_worse <= ALLOWED
    draw = f1(0.1, 0.05, 0.0, 1.5 * loss)
    assert rates(draw, n, f"loss {loss:.0%}, F1, some score nothing").not_worse <= ALLOWED


@pytest.mark.parametrize("n", [100, 150, 200, 300, 400, 600, 1000])
def test_rare_failures_hide_in_small_changes_rarely(n: int) -> None:
    for noisy in (0.0, 0.01, 0.02, 0.05, 0.1, 0.3):
        draw = rare_failures(0.01, noisy)
        assert rates(draw, n, f"1 % fail, {noisy:.0%} change by 0.25").not_worse <= ALLOWED


@pytest.mark.parametrize(
    ("what", "draw"),
    [
        ("right or wrong, none turn better", right_or_wrong(0.0, 0.05)),
        ("right or wrong, 0.3 % turn better", right_or_wrong(0.003, 0.053)),
        ("4 answers, all found", answers(1.0, 0.0, 0.05)),
        ("4 answers, 90 % found", answers(0.9, 0.05, 0.055 / 0.9)),
        ("F1, 30 % change", f1(0.3, 0.2, -0.05 / 0.3)),
        ("F1, some score nothing", f1(0.1, 0.1, 0.0, 0.075)),
    ],
)
def test_a_planted_loss_of_five_points_is_found_with_200_samples(what: str, draw: Draw) -> None:
    found = rates(draw, 200, f"planted: {what}")
    assert found.delta == pytest.approx(-5, abs=0.15)
    assert found.worse >= 0.9


def test_equal_models_are_cleared_with_enough_samples() -> None:
    assert rates(right_or_wrong(0.0, 0.0), 400, "the same answers").not_worse == 1
    assert rates(right_or_wrong(0.005, 0.005), 3000, "A/A, 0.5 % turn each way").not_worse >= 0.9
    fractions = rates(answers(0.9, 0.09, 0.01), 1000, "A/A, 4 answers, 1.8 % turn").not_worse
    assert fractions >= 0.9, "a fraction's smaller variance is used"


@pytest.mark.parametrize("truth", ["no loss", "loss at the margin", "half and half"])
def test_a_family_of_verdicts_is_wrong_as_rarely_as_one(truth: str) -> None:
    """Eight candidates at once: the chance that any verdict is wrong, with Holm's procedure and without."""
    lossy = np.array(
        {"no loss": [False] * 8, "loss at the margin": [True] * 8, "half and half": [False, True] * 4}[truth]
    )
    shares = [[0.02, 0.02 + 0.01 * loss, 0.96 - 0.01 * loss] for loss in lossy]
    rng = np.random.default_rng(8)
    counts = np.stack([rng.multinomial(1000, share, TRIALS) for share in shares], 1).astype(float)
    p_not_worse, p_worse = p_values(Counts(np.float64(1000), counts[..., 0], counts[..., 1]), 1.0)
    cleared, convicted = p_not_worse <= ALPHA / 2, p_worse <= ALPHA / 2
    alone = (np.where(lossy, cleared, convicted & ~cleared)).any(1).mean()
    found = np.array([verdicts(*row) for row in zip(p_not_worse, p_worse, strict=True)])
    together = (found == np.where(lossy, "not worse", "worse")).any(1).mean()
    print(f"8 candidates, {truth}: any verdict wrong {together:.1%}; each on its own {alone:.1%}")
    assert together <= ALLOWED
    assert alone > ALLOWED, "eight verdicts read on their own are wrong too often"


def test_verdicts_are_what_the_interval_says() -> None:
    rng = np.random.default_rng(4)
    seen = set()
    for _ in range(60):
        n, loss, gain = int(rng.integers(20, 900)), rng.uniform(0, 0.06), rng.uniform(0, 0.01)
        base = rng.choice([0.0, 0.25, 1.0], n)
        moved = rng.choice([0.25, -0.25, 0.0], n, p=[gain, loss, 1 - gain - loss])
        found = compare(base.tolist(), (base + moved).clip(0, 1).tolist())
        low, high = found.delta_ci95
        expected = "not worse" if low > -1 else "worse" if high < 0 else "undecided"
        assert verdicts([found.p_not_worse], [found.p_worse]) == [expected]
        seen.add(expected)
    assert seen == {"not worse", "worse", "undecided"}


def test_two_seeds_of_one_model_seldom_differ() -> None:
    """The noise floor's interval, for samples that do not pair up, covers zero."""
    rng = np.random.default_rng(2)
    misses = 0
    for _ in range(TRIALS):
        first, second = (rng.random((2, 100)) < 0.9).astype(float).tolist()
        low, high = independent_interval(first, second)
        misses += not low <= 0 <= high
    print(f"two seeds of one model differ 'significantly' in {misses / TRIALS:.1%}")
    assert misses / TRIALS <= 0.06
