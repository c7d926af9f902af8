"""Greedy tokens of vLLM and of transformers on a checkpoint whose cache is compressed in blocks, in float32.

What a query sees depends on its position alone, so no scheduler path may change a token: prompts cut inside blocks,
prefix hits, preemption, drafts that complete a block and are rejected.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcompress import recipe as recipes
from kvcompress.checkpoint.manifest import Manifest
from kvcompress.methods import registry
from kvcompress.pipeline import compress as compressing
from tests import require, tiny
from tests.e2e import reference, vllm_engine

require.need("vllm")
pytestmark = pytest.mark.e2e

BLOCK = 32
LENGTHS = [1, 17, 31, 33, 64, 70, 130, 200]
TOKENS = 64
RECIPE = f"""\
version: 1
stages:
  - method: pca
    rank: {{k: 1.0, v: 0.75}}
  - method: gear
    bits: {{k: 4, v: 2}}
    block: {BLOCK}
"""
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


class Case:
    """A compressed tiny model with prompts and the tokens the transformers path gives for them."""

    def __init__(self, folder: Path, lengths: list[int], tokens: int = TOKENS, **config: Any) -> None:
        base = tiny.save_model(folder / "base", vocab_size=300, **config)
        tiny.save_tokenizer(base)
        self.model = folder / "compressed"
        made = recipes.parse(RECIPE, registry.schemas())
        options = compressing.Options(samples=8, length=128)
        compressing.compress(str(base), made, self.model, options, lambda *_: None)
        self.prompts, self.expected = reference.greedy(self.model, lengths, tokens)
        self.tokens = tokens

    def run(self, passes: int = 1, last: int = len(LENGTHS), **engine: Any) -> dict[str, Any]:
        """Serve the prompts, or the last few of them; every pass must give the expected tokens."""
        result = vllm_engine.run(self.model, *[self.prompts[-last:]] * passes, max_tokens=self.tokens, **engine)
        assert result["tokens"] == [self.expected[-last:]] * passes
        return result


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("llama"), LENGTHS)


def test_plain_and_from_the_prefix_cache(llama: Case) -> None:
    result = llama.run(passes=2)
    first, second = result["cached"]
    assert first == [0] * len(LENGTHS)
    # Rings do not coarsen what is shared: whole blocks are reused, and the last prompt token is always computed.
    assert second == [(length - 1) // BLOCK * BLOCK for length in LENGTHS]
    assert all(len(set(tokens)) > 24 for tokens in llama.expected), "a model that repeats itself proves little"
    per_token = Manifest.load(llama.model).bytes_per_token.compressed
    assert f"KV cache {per_token} bytes per token" in result["log"]
    per_request = tiny.NUM_LAYERS * (BLOCK + 1) * 2 * tiny.NUM_KV_HEADS * tiny.HEAD_DIM * 4
    assert f"newest tokens uncompressed: {per_request} bytes per running request" in result["log"]


def test_prompts_cut_inside_blocks_preemption_and_prefix_hits_together(llama: Case) -> None:
    result = llama.run(passes=2, max_num_batched_tokens=24, num_gpu_blocks_override=50)
    assert result["metrics"]["vllm:num_preemptions"] > 0
    assert result["metrics"]["vllm:prefix_cache_hits"] > 0


def test_speculative_decoding(llama: Case) -> None:
    result = llama.run(last=4, speculative_config=NGRAM, max_num_batched_tokens=48)
    drafted = result["metrics"]["vllm:spec_decode_num_draft_tokens"]
    assert 0 < result["metrics"]["vllm:spec_decode_num_accepted_tokens"] < drafted


def test_several_blocks_in_a_page(llama: Case) -> None:
    result = llama.run(passes=2, block_size=3 * BLOCK, max_num_batched_tokens=40)
    assert result["cached"][1] == [(length - 1) // (3 * BLOCK) * 3 * BLOCK for length in LENGTHS]


def test_compiled_model(llama: Case, tmp_path: Path) -> None:
    result = llama.run(enforce_eager=False, env={"VLLM_CACHE_ROOT": str(tmp_path)})
    assert "CompilationMode.DYNAMO_TRACE_ONCE" in result["log"]


def test_tensor_parallel(tmp_path: Path) -> None:
    case = Case(tmp_path, [17, 130], tokens=24)
    case.run(tensor_parallel_size=2, env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})


def test_engines_that_cannot_serve_blocks_are_refused(llama: Case) -> None:
    model = str(llama.model)
    size, manager = vllm_engine.refusals(
        {"model": model, "block_size": 48}, {"model": model, "disable_hybrid_kv_cache_manager": True}
    )
    assert f"compresses {BLOCK} tokens at a time; use a multiple of that, such as 64" in size
    assert "disable-hybrid-kv-cache-manager" in manager
