"""Factored weights in vLLM and in transformers: the same greedy tokens, prefix caching on, with and without a codec."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcompress.methods import fwsvd
from kvcompress.methods.ranks import Ranks, Shape
from kvcompress.modeling.low_rank import ranks_of
from tests import compression, require, tiny
from tests.e2e import reference, vllm_engine

require.need("vllm")
pytestmark = pytest.mark.e2e

LENGTHS = [3, 33, 130]
MIXED = "  - method: fwsvd\n    weighting: activation\n    ranks: uniform\n    removed: 0.3\n    targets: [{}]\n"
CODEC = "  - method: pca\n  - method: scalar\n    bits: 8\n"


def factored(folder: Path, architecture: str, targets: str, more: str = "", **config: object) -> Path:
    """A tiny model with these layers factored, each projection at a rank of its own shape."""
    base = tiny.save_model(folder / "base", architecture, vocab_size=300, **config)
    tiny.save_tokenizer(base)
    compression.compress(base, folder / "out", MIXED.format(targets) + more, samples=4, length=64)
    return folder / "out"


@pytest.mark.parametrize(
    ("architecture", "targets", "more"),
    [
        # Merged layers of all kinds: q and v factored beside a dense k, both of gate and up, and one of them.
        ("Llama", "q_proj, v_proj, o_proj, gate_proj, up_proj, down_proj", CODEC),
        ("Qwen2", "k_proj, v_proj, o_proj, up_proj", ""),
    ],
)
def test_same_tokens_as_transformers(architecture: str, targets: str, more: str, tmp_path: Path) -> None:
    model = factored(tmp_path, architecture, targets, more)
    ranks = ranks_of(json.loads((model / "config.json").read_text()))
    assert len(ranks) == tiny.NUM_LAYERS * len(targets.split(","))
    assert len(set(ranks.values())) > 1
    prompts, expected = reference.greedy(model, LENGTHS, 48)
    result = vllm_engine.run(model, prompts, prompts, max_tokens=48, max_num_batched_tokens=24)
    assert result["tokens"] == [expected] * 2
    assert result["metrics"]["vllm:prefix_cache_hits"] > 0


def test_factors_of_full_rank_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(shapes: list[Shape], removed: float) -> Ranks:
        return [min(shape.out_features, shape.in_features) for shape in shapes]

    monkeypatch.setattr(fwsvd, "uniform", full)
    model = factored(tmp_path, "Llama", "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj")
    assert len(ranks_of(json.loads((model / "config.json").read_text()))) == tiny.NUM_LAYERS * 7
    prompts, expected = reference.greedy(tmp_path / "base", LENGTHS, 48)
    assert vllm_engine.run(model, prompts, max_tokens=48)["tokens"] == [expected]


def test_two_tensor_parallel_ranks_share_one_kv_head(tmp_path: Path) -> None:
    model = factored(tmp_path, "Llama", "q_proj, k_proj, o_proj, gate_proj, down_proj", num_key_value_heads=1)
    prompts, expected = reference.greedy(model, [17, 130], 24)
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    result = vllm_engine.run(model, prompts, max_tokens=24, tensor_parallel_size=2, env=env)
    assert result["tokens"] == [expected]
