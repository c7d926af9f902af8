"""Latent attention in vLLM: the transformers path's greedy tokens, under prefix caching and chunked prefill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcompress import modeling
from kvcompress.checkpoint.manifest import Manifest
from tests import compression, require, tiny
from tests.compression import listed
from tests.e2e import reference, vllm_engine

require.need("vllm")
pytestmark = pytest.mark.e2e

KEYS = tiny.NUM_KV_HEADS * tiny.HEAD_DIM
FULL = f"rope_dim: {KEYS}, kv_lora_rank: {KEYS}, freqfold: 1"
LOSSY = "rope_dim: 32, kv_lora_rank: 48, freqfold: 1"
LENGTHS = [3, 33, 70, 130]


def convert(folder: Path, stage: str, architecture: str = "Llama", **config: Any) -> tuple[Path, Path]:
    modeling.register()
    base = tiny.save_model(folder / "base", architecture, vocab_size=300, **config)
    tiny.save_tokenizer(base)
    compression.compress(base, folder / "out", listed(f"method: transmla, {stage}"), samples=4)
    return base, folder / "out"


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
def test_nothing_dropped_gives_the_base_models_tokens(architecture: str, tmp_path: Path) -> None:
    base, out = convert(tmp_path, FULL, architecture)
    prompts, expected = reference.greedy(base, LENGTHS, 32)
    served = vllm_engine.run(out, prompts, prompts, max_tokens=32, max_num_batched_tokens=24)
    assert served["tokens"] == [expected, expected]
    assert served["metrics"]["vllm:prefix_cache_hits"] > 0


def test_lossy_tokens_capacity_and_report(tmp_path: Path) -> None:
    base, out = convert(tmp_path, LOSSY)
    prompts, expected = reference.greedy(out, LENGTHS, 32)
    assert expected != reference.greedy(base, LENGTHS, 32)[1]
    pool = 5 * 2**20 + 12345
    options: dict[str, Any] = {"max_num_batched_tokens": 40, "kv_cache_memory_bytes": pool}
    served = vllm_engine.run(out, prompts, prompts, max_tokens=32, **options)
    assert served["tokens"] == [expected, expected]
    assert served["cached"][1] == [(length - 1) // 32 * 32 for length in LENGTHS]
    per_token = Manifest.load(out).bytes_per_token
    # The manifest counts 16 bits a number, as vLLM chooses for this checkpoint; this engine was asked for 32.
    assert per_token.compressed == tiny.NUM_LAYERS * (48 + 32) * 2
    stored = 2 * int(per_token.compressed)
    assert served["blocks"] == pool // (32 * stored)
    assert f"KV cache {stored} bytes per token, {per_token.ratio:.2f}x smaller" in served["log"]
    assert "agrees with its manifest" in served["log"]


def test_tensor_parallel(tmp_path: Path) -> None:
    _, out = convert(tmp_path, f"{LOSSY}, q_lora_rank: 96")
    prompts, expected = reference.greedy(out, [17, 70], 16)
    served = vllm_engine.run(
        out, prompts, max_tokens=16, tensor_parallel_size=2, env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    )
    assert served["tokens"] == [expected]


def test_compiled_model(tmp_path: Path) -> None:
    _, out = convert(tmp_path, LOSSY, "Mistral")
    prompts, expected = reference.greedy(out, [17, 70], 16)
    served = vllm_engine.run(out, prompts, max_tokens=16, enforce_eager=False, env={"VLLM_CACHE_ROOT": str(tmp_path)})
    assert served["tokens"] == [expected]
