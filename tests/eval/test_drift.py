"""Drift by position against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from kvcompress_eval.engines import Scores
from kvcompress_eval.tasks import drift

from tests.eval.fake_engine import FakeEngine

PROMPTS = [[1, 2, 3], [7, 8, 9, 10]]


def silent(done: int, total: int) -> None:
    assert done <= total


class Fading(FakeEngine):
    """Gets less certain from a position on."""

    def __init__(self, start: int, certainty: float) -> None:
        super().__init__()
        self.start, self.later = start, FakeEngine(certainty=certainty)

    def score(self, tokens, *, distribution=False, rows=None):  # type: ignore[no-untyped-def]
        first = super().score(tokens, distribution=distribution)
        later = self.later.score(tokens, distribution=distribution)
        early = np.arange(len(first.top1_T)) < self.start
        assert first.distribution_TV is not None
        assert later.distribution_TV is not None
        whole = np.where(early[:, None], first.distribution_TV, later.distribution_TV)
        log_probs = np.where(early, first.log_probs_T, later.log_probs_T)
        return Scores(log_probs, first.top1_T, whole if rows is None else whole[list(rows)])


def test_buckets_double_and_cover_everything() -> None:
    assert drift.buckets(100) == [(0, 16), (16, 32), (32, 64), (64, 100)]
    assert drift.buckets(16) == [(0, 16)]
    assert drift.buckets(5) == [(0, 5)]
    positions = drift.compared(4096)
    assert positions == sorted(set(positions))
    for start, end in drift.buckets(4096):
        assert sum(start <= at < end for at in positions) == min(32, end - start)
        assert {start, end - 1} <= set(positions)


def test_a_model_does_not_drift_from_itself() -> None:
    reference = drift.collect_reference(FakeEngine(), PROMPTS, 40, progress=silent)
    found = drift.measure(FakeEngine(), reference, seed=0, progress=silent)
    assert (found["prompts"], found["new_tokens"]) == (2, 40)
    assert [(row["position"], row["end"], row["tokens"]) for row in found["points"]] == [
        (0, 16, 32),
        (16, 32, 32),
        (32, 40, 16),
    ]
    for row in found["points"]:
        assert (row["top1"], row["nll_increase"], row["kl"], row["kl_ci95"]) == (1.0, 0.0, 0.0, [0.0, 0.0])


def test_where_a_candidate_fades_is_where_it_shows() -> None:
    base = FakeEngine()
    reference = drift.collect_reference(base, [PROMPTS[0]], 64, progress=silent)
    assert base.continued == [(1, 2, 3)]
    # Position 32 of the continuation is the entry of the token before it.
    found = drift.measure(Fading(3 - 1 + 32, 0.6), reference, seed=0, progress=silent)
    expected = 0.9 * np.log(0.9 / 0.6) + 0.1 * np.log(0.1 / 0.4)
    first, second, third = found["points"]
    assert first["kl"] == second["kl"] == 0.0
    assert third["kl"] == pytest.approx(expected, rel=1e-5)
    assert third["nll_increase"] == pytest.approx(np.log(0.9 / 0.6), rel=1e-5)
    assert third["kl_ci95"] == pytest.approx([expected, expected], rel=1e-5)


def test_another_rule_never_agrees_with_the_bases_text() -> None:
    reference = drift.collect_reference(FakeEngine(), PROMPTS, 20, progress=silent)
    candidate = FakeEngine(step=3)
    found = drift.measure(candidate, reference, seed=0, progress=silent)
    assert [row["top1"] for row in found["points"]] == [0.0, 0.0]
    assert candidate.continued == [], "the candidate is fed the base's text and writes none"
    assert candidate.scored == [item.tokens for item in reference]


def test_engines_without_distributions_give_top1_and_loss() -> None:
    blind = FakeEngine(certainty=0.6, blind=True)
    reference = drift.collect_reference(FakeEngine(), PROMPTS, 20, progress=silent)
    for row in drift.measure(blind, reference, seed=0, progress=silent)["points"]:
        assert (row["top1"], row["kl"], row["kl_tokens"]) == (1.0, None, 0)
        assert row["nll_increase"] == pytest.approx(np.log(0.9 / 0.6), rel=1e-5)
