"""Agreement with the base model: shares, divergences and their tail against values worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kvcompress_eval.tasks import agreement
from kvcompress_eval.tasks.agreement import Reference, by_position, first_difference, parts, summarise
from kvcompress_eval.tasks.divergence import kl_rows
from kvcompress_eval.tasks.perplexity import Window, windows

from tests.eval.fake_engine import FakeEngine

WINDOWS = [
    Window(tuple(at % 16 for at in range(40)), 39, "prose"),
    Window(tuple(at % 16 for at in range(5, 35)), 20, "code"),
]
PROMPTS = [[1, 2, 3], [7, 8, 9, 10]]


def silent(done: int, total: int) -> None:
    assert done <= total


def read(base: FakeEngine, candidate: FakeEngine, again: range = range(2)) -> list[dict[str, Any]]:
    """The candidate's rows on the windows."""
    kept: dict[int, Any] = {}
    list(agreement.text_rows(base, WINDOWS, range(2), keep=kept))
    return list(agreement.text_rows(candidate, WINDOWS, again, reference=Reference(texts=kept)))


def measure(base: FakeEngine, candidate: FakeEngine) -> dict[str, Any]:
    reference = agreement.collect_reference(base, PROMPTS, new_tokens=6, progress=silent)
    found = agreement.measure(candidate, reference, new_tokens=6, seed=0, progress=silent)
    return {**found, "text": summarise(read(base, candidate), seed=0)}


def test_a_model_agrees_with_itself() -> None:
    found = measure(FakeEngine(), FakeEngine())
    for source, tokens in (("text", 39 + 20), ("tasks", 12)):
        assert found[source]["tokens"] == found[source]["kl_tokens"] == tokens
        assert found[source]["top1"] == 1.0
        assert found[source]["kl"] == found[source]["kl_p999"] == 0.0
    assert found["divergence"] == {"prompts": 2, "identical": 1.0, "median_first": 6.0, "new_tokens": 6}


def test_another_certainty_changes_the_kl_only() -> None:
    found = measure(FakeEngine(certainty=0.9), FakeEngine(certainty=0.6))
    assert found["text"]["top1"] == 1.0
    expected = 0.9 * np.log(0.9 / 0.6) + 0.1 * np.log(0.1 / 0.4)
    for figure in ("kl", "kl_p99", "kl_p999"):
        assert found["text"][figure] == pytest.approx(expected, rel=1e-5)
        assert found["tasks"][figure] == pytest.approx(expected, rel=1e-5)


def test_another_rule_never_agrees() -> None:
    found = measure(FakeEngine(step=1), FakeEngine(step=2))
    assert found["text"]["top1"] == 0.0
    assert found["divergence"]["identical"] == 0.0
    assert found["divergence"]["median_first"] == 0.0


def test_candidates_are_scored_on_the_continuations_of_the_base() -> None:
    base, candidate = FakeEngine(), FakeEngine(step=3)
    measure(base, candidate)
    assert (1, 2, 3, 4, 5, 6, 7, 8, 9) in candidate.scored


def test_each_window_is_read_once_and_gives_loss_and_agreement() -> None:
    base, candidate = FakeEngine(), FakeEngine(certainty=0.6)
    rows = read(base, candidate)
    assert [len(engine.scored) for engine in (base, candidate)] == [2, 2]
    assert [row["kind"] for row in rows] == ["prose", "code"]
    assert [len(row["nll"]) for row in rows] == [len(row["same"]) for row in rows] == [39, 20]
    assert rows[0]["nll"] == pytest.approx([-np.log(0.6)] * 39, rel=1e-5)
    assert read(base, candidate, range(1, 2)) == rows[1:], "a window does not depend on those before it"


def test_engines_without_distributions_give_no_kl() -> None:
    for pair in ((FakeEngine(), FakeEngine(blind=True)), (FakeEngine(blind=True), FakeEngine())):
        found = measure(*pair)
        assert found["text"]["kl"] is found["text"]["kl_p999"] is None
        assert found["text"]["kl_tokens"] == 0
        assert found["text"]["top1"] == 1.0


def test_the_tail_shows_what_the_mean_hides() -> None:
    calm = {"same": [1] * 1000, "kl": [0.001] * 1000}
    wild = {"same": [1] * 998 + [0] * 2, "kl": [0.001] * 998 + [8.0] * 2}
    one, other = summarise([calm, calm], seed=0), summarise([calm, wild], seed=0)
    assert other["kl"] == pytest.approx(0.001 + 2 * 7.999 / 2000)
    assert one["kl_p999"] == pytest.approx(0.001)
    assert other["kl_p99"] == pytest.approx(0.001)
    values = np.sort(calm["kl"] + wild["kl"])
    assert other["kl_p999"] == pytest.approx(np.quantile(values, 0.999))
    assert other["kl_p999"] > 0.001


def test_distributions_that_do_not_fit_are_compared_at_tokens_evenly_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "MAX_DISTRIBUTION_BYTES", 4 * 16 * 20)
    made = parts([(window.tokens, window.scored) for window in WINDOWS], 16)
    counts = [len(part.rows) for part in made]
    assert 17 <= sum(counts) <= 20
    assert min(counts) >= 6, "no window is left out"
    for part in made:
        first, last = len(part.tokens) - 1 - part.scored, len(part.tokens) - 2
        assert first <= part.rows[0] <= part.rows[-1] <= last
        assert set(np.diff(part.rows)) <= {2, 3, 4}, "evenly"
    rows = read(FakeEngine(certainty=0.9), FakeEngine(certainty=0.6))
    assert [len(row["kl"]) for row in rows] == [len(row["kl_at"]) for row in rows] == counts
    assert [len(row["same"]) for row in rows] == [39, 20], "all other figures are of all tokens"


def test_kl_takes_impossible_tokens() -> None:
    base = np.log(np.array([[0.5, 0.5, 1e-300]]))
    base[0, 2] = -np.inf
    other = np.log(np.array([[0.25, 0.5, 0.25]]))
    assert kl_rows(base, other).sum() == pytest.approx(0.5 * np.log(2))


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2


def test_positions_are_means_over_windows_that_begin_to_count_at_different_places() -> None:
    whole = {"same": [1, 0, 1], "kl": [1.0, 2.0, 3.0], "kl_at": [0, 1, 2]}
    later = {"same": [0, 0], "kl": [5.0], "kl_at": [1]}
    assert by_position([whole, later], [0, 1], bucket=2) == [
        {"position": 0, "tokens": 3, "kl": 1.5, "top1": 1 / 3},
        {"position": 2, "tokens": 2, "kl": 4.0, "top1": 0.5},
    ]


def test_disjoint_windows_score_every_token_once() -> None:
    cut = list(windows(range(100), 32, 31, (7,), "prose"))
    assert [window.scored for window in cut] == [31, 31, 31, 7]
    assert {window.kind for window in cut} == {"prose"}
