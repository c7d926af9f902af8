"""Agreement with the base model: shares, divergences and KL against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from kvcompress_eval.tasks import agreement
from kvcompress_eval.tasks.agreement import by_position, collect_reference, first_difference
from kvcompress_eval.tasks.divergence import kl_rows

from tests.eval.fake_engine import FakeEngine

TEXTS = [[at % 16 for at in range(40)], [at % 16 for at in range(5, 35)]]
PROMPTS = [[1, 2, 3], [7, 8, 9, 10]]


def silent(done: int, total: int) -> None:
    assert done <= total


def measure(base: FakeEngine, candidate: FakeEngine) -> dict[str, dict[str, float]]:
    reference = collect_reference(base, TEXTS, PROMPTS, new_tokens=6, progress=silent)
    return agreement.measure(candidate, reference, new_tokens=6, seed=0, progress=silent)


def test_a_model_agrees_with_itself() -> None:
    found = measure(FakeEngine(), FakeEngine())
    for source, tokens in (("text", 39 + 29), ("tasks", 12)):
        assert found[source]["tokens"] == tokens
        assert found[source]["top1"] == 1.0
        assert found[source]["kl"] == 0.0
    assert found["divergence"] == {"prompts": 2, "identical": 1.0, "median_first": 6.0, "new_tokens": 6}


def test_another_certainty_changes_the_kl_only() -> None:
    found = measure(FakeEngine(certainty=0.9), FakeEngine(certainty=0.6))
    assert found["text"]["top1"] == 1.0
    expected = 0.9 * np.log(0.9 / 0.6) + 0.1 * np.log(0.1 / 0.4)
    assert found["text"]["kl"] == pytest.approx(expected, rel=1e-5)
    assert found["tasks"]["kl"] == pytest.approx(expected, rel=1e-5)


def test_another_rule_never_agrees() -> None:
    found = measure(FakeEngine(step=1), FakeEngine(step=2))
    assert found["text"]["top1"] == 0.0
    assert found["divergence"]["identical"] == 0.0
    assert found["divergence"]["median_first"] == 0.0


def test_candidates_are_scored_on_the_continuations_of_the_base() -> None:
    base, candidate = FakeEngine(), FakeEngine(step=3)
    measure(base, candidate)
    assert (1, 2, 3, 4, 5, 6, 7, 8, 9) in candidate.scored


def test_engines_without_distributions_give_no_kl() -> None:
    blind = FakeEngine()
    blind.has_distribution = False
    found = measure(FakeEngine(), blind)
    assert found["text"]["kl"] is None
    assert found["text"]["top1"] == 1.0


def test_kl_takes_impossible_tokens() -> None:
    base = np.log(np.array([[0.5, 0.5, 1e-300]]))
    base[0, 2] = -np.inf
    other = np.log(np.array([[0.25, 0.5, 0.25]]))
    assert kl_rows(base, other).sum() == pytest.approx(0.5 * np.log(2))


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2


def test_positions_are_means_over_sequences_of_different_lengths() -> None:
    long, short = (np.array([1.0, 2.0, 3.0]), np.array([True, False, True])), (np.array([5.0]), np.array([False]))
    assert by_position([long, short], bucket=2) == [
        {"position": 0, "tokens": 3, "kl": 8 / 3, "top1": 1 / 3},
        {"position": 2, "tokens": 1, "kl": 3.0, "top1": 1.0},
    ]
