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
from tests.e2e import vllm_engine

pytest.importorskip("vllm")
pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "assets" / "reference-model"
LENGTHS = (1, 40, 100, 257, 400, 513, 700, 900)
TOKENS = 64
CLEAR = 1e-3
"""A lead over the second logit below which two engines may round to different tokens."""


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


@torch.no_grad()
def clear_greedy(model: torch.nn.Module, directory: Path, prompt: list[int]) -> list[int]:
    """Greedy tokens of the transformers path, up to the first that is not decided by a clear margin."""
    cache, step, made = CompressedCache.from_pretrained(directory), torch.tensor([prompt]), []
    while len(made) < TOKENS:
        logits = model(step, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        if first - second < CLEAR:
            break
        made.append(int(logits.argmax()))
        step = torch.tensor([made[-1:]])
    return made


def test_vllm_gives_the_transformers_tokens_and_the_planned_capacity(balanced: Path) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer((MODEL / "heldout.txt").read_text(encoding="utf-8"))["input_ids"]
    prompts = [[ids[0], *ids[1000 * n + 1 : 1000 * n + length]] for n, length in enumerate(LENGTHS)]
    model = AutoModelForCausalLM.from_pretrained(balanced, dtype=torch.float32).eval()
    expected = [clear_greedy(model, balanced, prompt) for prompt in prompts]
    assert sum(map(len, expected)) >= 0.9 * TOKENS * len(prompts), "too few clear tokens to show anything"
    plan = planning.make(Checkpoint.open(MODEL), recipe("balanced"), str(MODEL))
    pool = 32 * 80 * plan.bytes_per_token  # 80 blocks: the prompts and answers need more, so some are preempted
    result = vllm_engine.run(
        balanced,
        prompts,
        prompts,
        max_tokens=TOKENS,
        max_model_len=1024,
        max_num_batched_tokens=120,
        kv_cache_memory_bytes=pool,
        long_prefill_token_threshold=50,
    )
    for found in result["tokens"]:
        for tokens, clear in zip(found, expected, strict=True):
            assert tokens[: len(clear)] == clear
    assert result["metrics"]["vllm:num_preemptions"] > 0
    assert result["metrics"]["vllm:prefix_cache_hits"] > 0
    assert result["capacity_tokens"] == pytest.approx(pool / plan.bytes_per_token, rel=0.01)
