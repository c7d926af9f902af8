"""Both engines on the bundled reference model: the same scores, or samples that were decided by next to nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from kvcompress_eval import parity
from kvcompress_eval.candidates import make_checkpoints
from kvcompress_eval.engines import Generation
from kvcompress_eval.parity import compare_engines, margin, markdown
from kvcompress_eval.suite import SUITES, Suite
from kvcompress_eval.tasks.ruler.registry import OFFICIAL

from tests.eval.fake_engine import FakeEngine

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "assets" / "reference-model"

TIE = 0.02
"""Nats. Engines that compute in float32 in another order differ by less."""


@pytest.mark.e2e
@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference model is not in this checkout")
def test_both_engines_score_the_reference_model_alike(tmp_path: Path) -> None:
    recipe = ROOT / "examples" / "recipes" / "aggressive.yaml"
    compressed = make_checkpoints(str(REFERENCE), [str(recipe)], tmp_path, lambda what, done, total: None)
    tasks = tuple(dict.fromkeys([*SUITES["needle-ref"].tasks, *OFFICIAL]))
    suite = Suite(summary="", tasks=tasks, lengths=(800,), samples=2)
    results, differences = compare_engines(
        compressed, out=tmp_path / "out", baseline=REFERENCE, suite=suite, cache_dir=tmp_path / "cache"
    )
    print(markdown(results, differences))
    unexplained = [item for item in differences if abs(item.margin) > TIE]
    assert not unexplained, markdown(results, unexplained)
    told = {(item.task, item.model) for item in differences}
    rows = [results[engine]["tasks"] for engine in parity.ENGINES]
    skipped = {row["task"] for row in results["vllm"]["skipped"]}
    assert {row["task"] for row in rows[0]} == set(tasks) - skipped
    assert set(SUITES["needle-ref"].tasks).isdisjoint(skipped)
    assert {row["model"] for row in rows[0]} == {"reference-model", "aggressive"}
    for one, two in zip(*rows, strict=True):
        assert one["score"] == two["score"] or (one["task"], one["model"]) in told


def test_a_sample_that_differs_is_shown_with_its_margin(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One engine's second answer has another third token; everything else is the same."""
    from kvcompress_eval import evaluate

    class Scripted(FakeEngine):
        def __init__(self, kind: str) -> None:
            super().__init__(vocabulary=1024, certainty=0.9)
            self.kind = kind

        def generate(self, prompts: Any, max_tokens: int, until: Any = None, **more: Any) -> list[Generation]:
            made = []
            for prompt in prompts:
                self.continued.append(tuple(prompt))
                odd = self.kind == "vllm" and len(self.continued) == 2
                tokens = (70, 71, 73 if odd else 72)
                made.append(Generation(tokens, "|".join(map(str, tokens))))
            return made

    monkeypatch.setattr(evaluate, "open_engine", lambda kind, *args, **more: Scripted(kind))
    monkeypatch.setattr(parity, "open_engine", lambda kind, *args, **more: Scripted(kind))
    suite = Suite(summary="", tasks=("fwe",), lengths=(400,), samples=3)
    results, [found] = compare_engines(
        [base], out=tmp_path, baseline=None, suite=suite, seed=1, cache_dir=tmp_path / "cache"
    )
    assert (found.task, found.index, found.at) == ("fwe", 1, 2)
    assert found.answers == ("70|71|72", "70|71|73")
    # The rule says 72 after 71 with probability 0.9, and shares the rest among the other 1,023 tokens.
    assert found.margin == pytest.approx(math.log(0.9 / (0.1 / 1023)), abs=1e-4)
    table = markdown(results, [found])
    assert "| fwe | 400 | base | 0.0 | 0.0 | 1 of 3 |" in table
    assert "| base, fwe, 400, 1 | 0.00 / 0.00 | 2 |" in table
    assert r"`70\|71\|72` / `70\|71\|73`" in table
    rows = (tmp_path / "vllm" / "samples" / "fwe-400-base.jsonl").read_text().splitlines()
    assert [json.loads(row)["tokens"][2] for row in rows] == [72, 73, 72]


def test_margin_is_the_difference_of_log_probabilities() -> None:
    engine = FakeEngine(vocabulary=16, certainty=0.85)
    assert margin(engine, [3, 4], 5, 9) == pytest.approx(math.log(0.85 / 0.01), abs=1e-4)
    assert margin(engine, [3, 4], 9, 5) == pytest.approx(-math.log(0.85 / 0.01), abs=1e-4)


def test_without_differences_there_is_one_table() -> None:
    row = {"task": "vt", "length": 512, "model": "m", "score": 50.0, "n": 4}
    text = markdown({"transformers": {"tasks": [row]}, "vllm": {"tasks": [row]}}, [])
    assert text.splitlines()[2:] == ["| vt | 512 | m | 50.0 | 50.0 | 0 of 4 |"]
