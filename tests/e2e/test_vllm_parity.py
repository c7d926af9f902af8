"""Greedy tokens of vLLM and of transformers on the same compressed checkpoint, in float32, under every scheduler path.

Both attend every token in its stored form, so neither chunking nor prefix hits, preemption or rejected drafts may
change a token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcompress.codec.spec import CodecSpec
from tests import require, tiny
from tests.e2e import reference, vllm_engine

require.need("vllm")
pytestmark = pytest.mark.e2e

LENGTHS = [1, 3, 17, 33, 64, 70, 130, 200]
BLOCK_SIZE = vllm_engine.ENGINE["block_size"]
# Prompts are cut inside blocks, and two thirds of what the prompts and answers need fit.
PRESSED = {"max_num_batched_tokens": 24, "num_gpu_blocks_override": 25}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


class Case:
    """A compressed tiny model with prompts and the tokens the transformers path gives for them."""

    def __init__(self, folder: Path, architecture: str, lengths: list[int], tokens: int = 64, **config: Any) -> None:
        base = tiny.save_model(folder / "base", architecture, **config)
        spec = tiny.mixed_spec(num_kv_heads=config.get("num_key_value_heads", tiny.NUM_KV_HEADS))
        self.model = tiny.save_compressed(base, folder / "compressed", spec)
        self.prompts, self.expected = reference.greedy(self.model, lengths, tokens)
        self.tokens = tokens

    def run(self, passes: int = 1, **engine: Any) -> dict[str, Any]:
        """Serve the prompts; every pass must give the expected tokens."""
        result = vllm_engine.run(self.model, *[self.prompts] * passes, max_tokens=self.tokens, **engine)
        assert result["tokens"] == [self.expected] * passes
        return result


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("llama"), "Llama", LENGTHS)


def test_plain_and_from_the_prefix_cache(llama: Case) -> None:
    result = llama.run(passes=2)
    first, second = result["cached"]
    assert first == [0] * len(LENGTHS)
    # Whole blocks are reused, and the last prompt token is always computed.
    assert second == [(length - 1) // BLOCK_SIZE * BLOCK_SIZE for length in LENGTHS]


def test_answers_vary(llama: Case) -> None:
    # The comparisons would prove little if the model repeated itself.
    assert all(len(set(tokens)) > 24 for tokens in llama.expected)


@pytest.mark.parametrize("env", [{}, {"KVCOMPRESS_LIBRARY": ""}], ids=["as installed", "torch code"])
def test_chunked_prefill_preemption_and_prefix_hits_together(llama: Case, env: dict[str, str]) -> None:
    result = llama.run(passes=2, env=env, **PRESSED)
    assert result["metrics"]["vllm:num_preemptions"] > 0
    assert result["metrics"]["vllm:prefix_cache_hits"] > 0


def test_speculative_decoding(llama: Case) -> None:
    result = llama.run(speculative_config=NGRAM, **PRESSED)
    drafted = result["metrics"]["vllm:spec_decode_num_draft_tokens"]
    assert 0 < result["metrics"]["vllm:spec_decode_num_accepted_tokens"] < drafted


def test_compiled_model(llama: Case, tmp_path: Path) -> None:
    result = llama.run(enforce_eager=False, env={"VLLM_CACHE_ROOT": str(tmp_path)})
    assert "CompilationMode.DYNAMO_TRACE_ONCE" in result["log"]


def test_cache_takes_the_bytes_of_the_codec(llama: Case) -> None:
    pool = 5 * 2**20 + 12345
    result = llama.run(kv_cache_memory_bytes=pool)
    uncompressed = 2 * tiny.NUM_KV_HEADS * tiny.HEAD_DIM * 4
    per_token = sum(uncompressed if layer is None else layer.bytes_per_token for layer in tiny.mixed_spec().layers)
    assert result["blocks"] == pool // (BLOCK_SIZE * per_token)
    assert result["capacity_tokens"] == pytest.approx(result["blocks"] * BLOCK_SIZE, abs=BLOCK_SIZE)
    assert f"KV cache {per_token} bytes per token" in result["log"]
    assert f"{uncompressed * tiny.NUM_LAYERS / per_token:.2f}x smaller" in result["log"]
    assert "uncompressed layers: 1: left out by the recipe" in result["log"]


@pytest.mark.parametrize("architecture", [name for name in tiny.ARCHITECTURES if name != "Llama"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    case = Case(tmp_path, architecture, [3, 33, 130])
    result = case.run(passes=2, max_num_batched_tokens=24)
    assert result["metrics"]["vllm:prefix_cache_hits"] > 0


@pytest.mark.parametrize("num_kv_heads", [2, 1], ids=["heads divided", "one head on both ranks"])
def test_tensor_parallel(num_kv_heads: int, tmp_path: Path) -> None:
    case = Case(tmp_path, "Llama", [17, 130], tokens=24, num_key_value_heads=num_kv_heads)
    result = case.run(tensor_parallel_size=2, env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    assert result["log"].count("agrees with its manifest") == 1, "files are verified once, not by every rank"
    assert "on tensor-parallel rank 1 of 2" in result["log"]


@pytest.mark.parametrize(
    ("bits", "hybrid"), [(16, False), (16, True), (32, False)], ids=["16", "16, one sliding window", "32"]
)
def test_floats_at_full_rank_change_nothing(bits: int, hybrid: bool, tmp_path: Path) -> None:
    layers = list(tiny.uniform_spec(bits).layers)
    config: dict[str, Any] = {}
    if hybrid:
        # vLLM's Llama honours layer types; it then puts the layers into several cache groups of one page size.
        config = {"sliding_window": 40, "layer_types": ["full_attention"] * tiny.NUM_LAYERS}
        config["layer_types"][1], layers[1] = "sliding_attention", None
    base = tiny.save_model(tmp_path / "base", **config)
    compressed = tiny.save_compressed(base, tmp_path / "compressed", CodecSpec(tuple(layers)))
    prompts, expected = reference.greedy(base, [17, 70, 200], 32)
    stock = vllm_engine.run(base, prompts, max_tokens=32)
    served = vllm_engine.run(compressed, prompts, prompts, max_tokens=32, max_num_batched_tokens=24)
    assert served["tokens"] == stock["tokens"] * 2
    if hybrid:
        assert "1: sliding window of 40" in served["log"]
    else:
        assert stock["tokens"] == [expected]
