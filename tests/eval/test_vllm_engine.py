"""vLLM as the engine: the same continuations and scores as transformers, base and compressed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kvcompress_eval
import numpy as np
import pytest
from kvcompress_eval.engines import open_engine
from kvcompress_eval.suite import Suite
from kvcompress_eval.tokenizer import TextTokenizer

pytestmark = pytest.mark.e2e

PROMPTS = [list(range(5, 5 + length)) for length in (40, 70, 13)]


@pytest.fixture(scope="module")
def both(base: Path) -> dict[str, Any]:
    """What each engine says about the base model."""
    tokenizer = TextTokenizer(base)
    said = {}
    for kind in ("transformers", "vllm"):
        engine = open_engine(kind, base, tokenizer, max_context=256, dtype="float32")
        made = engine.generate(PROMPTS, 24)
        wanted = [[tokenizer.decode(item.tokens[:4])] for item in made]
        said[kind] = {
            "made": made,
            "early": engine.generate(PROMPTS, 24, wanted),
            "scores": engine.score(PROMPTS[1]),
            "capacity": engine.capacity_tokens(),
        }
        engine.close()
    return said


def test_continuations_are_the_same(both: dict[str, Any]) -> None:
    assert both["vllm"]["made"] == both["transformers"]["made"]


def test_early_ends_are_the_same(both: dict[str, Any]) -> None:
    assert both["vllm"]["early"] == both["transformers"]["early"]
    pairs = zip(both["vllm"]["early"], both["vllm"]["made"], strict=True)
    assert all(len(early.tokens) < len(full.tokens) for early, full in pairs)


def test_scores_are_the_same(both: dict[str, Any]) -> None:
    ours, theirs = both["vllm"]["scores"], both["transformers"]["scores"]
    np.testing.assert_allclose(ours.log_probs_T, theirs.log_probs_T, atol=1e-3)
    assert ours.top1_T.tolist() == theirs.top1_T.tolist()


def test_capacity_is_reported(both: dict[str, Any]) -> None:
    assert both["transformers"]["capacity"] is None
    assert both["vllm"]["capacity"] > 1024


def test_an_evaluation_gives_the_same_scores_on_both_engines(base: Path, compressed: Path, tmp_path: Path) -> None:
    suite = Suite(
        summary="",
        tasks=("fwe", "multi_turn"),
        lengths=(700,),
        samples=2,
        text_tokens=300,
        window=128,
        stride=64,
    )
    results = {
        kind: kvcompress_eval.run(
            compressed,
            baseline=base,
            suite=suite,
            engine=kind,
            dtype="float32",
            text=base / "heldout.txt",
            out=tmp_path / kind,
            cache_dir=tmp_path / "cache",
            serving_context=64,
            serving_tokens=8,
        )
        for kind in ("transformers", "vllm")
    }
    for ours, theirs in zip(results["vllm"]["tasks"], results["transformers"]["tasks"], strict=True):
        assert ours["score"] == theirs["score"]
    for ours, theirs in zip(*(results[kind]["perplexity"]["models"] for kind in results), strict=True):
        assert ours["nll"] == pytest.approx(theirs["nll"], abs=2e-3)
    for name in ("base", "compressed"):
        rows = {kind: _rows(tmp_path / kind / "samples" / f"multi_turn-700-{name}.jsonl") for kind in results}
        for ours, theirs in zip(rows["vllm"], rows["transformers"], strict=True):
            for place in (lambda row: row, lambda row: row["follow_up"]):
                assert place(ours)["prompt_sha256"] == place(theirs)["prompt_sha256"]
            # Whole blocks are found again; one on the CPU has 128 tokens at most.
            shared = ours["follow_up"]["shared_tokens"]
            assert shared - 128 < ours["follow_up"]["cached_tokens"] <= shared
    capacity = {row["model"]: row["capacity_tokens_reported"] for row in results["vllm"]["serving"]["models"]}
    sizes = {model["name"]: model["bytes_per_token"] for model in results["vllm"]["models"]}
    # Blocks are whole, so the ratio of capacities is that of the bytes per token to within a few percent. Those of the
    # base are stated in 16 bits, and this engine was asked for 32.
    assert capacity["compressed"] / capacity["base"] == pytest.approx(2 * sizes["base"] / sizes["compressed"], rel=0.03)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
