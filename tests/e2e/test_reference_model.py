"""The bundled model through the whole chain: recipe, checkpoint, vLLM's capacity, and tokens of both engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcompress import recipe as recipes
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.methods import registry
from kvcompress.pipeline import compress as compressing
from kvcompress.pipeline import plan as planning
from kvcompress.serving.transformers import CompressedCache
from tests import require
from tests.e2e import reference, vllm_engine

require.need("vllm")
pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "assets" / "reference-model"
LENGTHS = (2, 40, 100, 257, 300, 400, 513, 600)
TOKENS = 64
CANDIDATES = 16
MARGIN = 0.01
"""Required lead of the best logit over the second, in standard deviations of all logits."""


def recipe(name: str) -> recipes.Recipe:
    return recipes.load(ROOT / "examples" / "recipes" / f"{name}.yaml", registry.schemas())


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "balanced"
    compressing.compress(str(MODEL), recipe("balanced"), out, compressing.Options(), lambda *_: None)
    return out


@pytest.mark.parametrize(("name", "ratio"), [("balanced", 4.0), ("aggressive", 8.0), ("half", 1.9), ("lossless", 1.0)])
def test_recipes_reach_their_ratio(name: str, ratio: float) -> None:
    assert planning.make(Checkpoint.open(MODEL), recipe(name), str(MODEL)).ratio >= ratio


def clear_prompts(directory: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Held-out text of each length whose continuation is decided most clearly, and its greedy tokens in transformers.

    Engines round differently, and now and then a latent falls on the other side of a quantizer's threshold. So the
    engines are compared where every step of the answer has a clear lead.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer((MODEL / "heldout.txt").read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompts, expected = [], []
    for number, length in enumerate(LENGTHS):
        starts = range(500 * number, len(ids) - length, (len(ids) - length - 500 * number) // CANDIDATES)
        windows = [[tokenizer.bos_token_id, *ids[start : start + length - 1]] for start in starts[:CANDIDATES]]
        cache = CompressedCache.from_pretrained(directory)
        tokens, margins = reference.generate(model, cache, torch.tensor(windows), TOKENS)
        best = int(margins.argmax())
        assert margins[best] >= MARGIN, f"no clear prompt of {length} tokens: {margins[best]:.4f}"
        prompts.append(windows[best])
        expected.append(tokens[best].tolist())
    return prompts, expected


def test_vllm_gives_the_transformers_tokens_and_the_planned_capacity(balanced: Path) -> None:
    prompts, expected = clear_prompts(balanced)
    plan = planning.make(Checkpoint.open(MODEL), recipe("balanced"), str(MODEL))
    pool = 32 * 36 * plan.bytes_per_token  # 36 blocks: the prompts and answers need more, so some are preempted
    result = vllm_engine.run(
        balanced,
        prompts,
        prompts[-1:],
        prompts[-1:],  # by now its blocks are in the cache
        max_tokens=TOKENS,
        max_model_len=1024,
        max_num_batched_tokens=120,
        kv_cache_memory_bytes=pool,
        long_prefill_token_threshold=50,
    )
    assert result["tokens"] == [expected, expected[-1:], expected[-1:]]
    assert result["metrics"]["vllm:num_preemptions"] > 0
    assert result["metrics"]["vllm:prefix_cache_hits"] > 0
    assert result["capacity_tokens"] == pytest.approx(pool / plan.bytes_per_token, rel=0.01)
