"""Layers that share a latent: vLLM against transformers on the same steps, prefix hits, and what must not start.

A step's own tokens are attended as they are, so answers depend on how a prompt is cut. Here both sides cut it alike:
whole, and in a second pass where the prefix cache ends.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcompress.checkpoint.manifest import Manifest
from tests import require
from tests.compression import compress, listed
from tests.e2e import reference, vllm_engine

require.need("vllm")
pytestmark = pytest.mark.e2e

LENGTHS = [3, 33, 70, 130]
BLOCK = vllm_engine.ENGINE["block_size"]
TOKENS = 24


@pytest.mark.parametrize(
    ("xkv", "encoding"),
    [
        # Kernels and torch round differently, and a latent that falls on the other side of a threshold is another code.
        # In narrow codes that changes a token now and then (four bits: the twelfth of one prompt in four here, at one
        # instruction-set level), in wide ones not. Which bytes a code has is what tests/ops is about.
        ("group: 3, rank: {k: 0.5, v: 0.75}", "bits: 8"),
        ("share: v, group: 2, rank: {k: 0.75, v: 0.5}", "target_bits_per_channel: {k: 5.25, v: 4}"),
        ("group: auto, max_error: 0.75, rank: 0.5", "bits: 8"),
        ("group: 2, rank: 0.75", "bits: 8, outliers: {k: 2, v: 1}"),
    ],
    ids=["keys and values", "values only", "automatic groups", "outliers"],
)
def test_tokens_are_those_of_transformers_on_the_same_steps(
    xkv: str, encoding: str, base_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    compress(base_model, model, listed(f"method: xkv, {xkv}", f"method: scalar, {encoding}"))
    hits = [(length - 1) // BLOCK * BLOCK for length in LENGTHS]
    found = [
        reference.answers(model, length, [hit] if hit else [], TOKENS)
        for length, hit in zip(LENGTHS, hits, strict=True)
    ]
    prompts = [prompt for prompt, _ in found]
    result = vllm_engine.run(model, prompts, prompts, max_tokens=TOKENS)
    first, second = result["tokens"]
    assert result["cached"] == [[0] * len(LENGTHS), hits]
    assert first == [outputs[0] for _, outputs in found]
    assert second == [outputs[-1] for _, outputs in found]
    assert any(one != other for one, other in zip(first, second, strict=True)) or "share: v" in xkv
    assert f"KV cache {Manifest.load(model).bytes_per_token.compressed} bytes per token" in result["log"]


def test_every_scheduler_path_runs_and_full_rank_in_sixteen_bits_changes_no_token(
    base_model: Path, tmp_path: Path
) -> None:
    """Latents within the rounding of halves: however a prompt is cut, the base model's clear tokens come out."""
    model = tmp_path / "model"
    compress(base_model, model, listed("method: xkv, group: 4, rank: 1.0, metric: none", "method: scalar, bits: 16"))
    prompts, expected = [], []
    for length in (28, 60, 90, 124):  # answers need one block more than prompts do: the pool is too small by then
        prompt, outputs = reference.answers(model, length, [length // 2], TOKENS)
        prompts.append(prompt)
        expected.append(outputs[0])
    result = vllm_engine.run(
        model,
        prompts,
        prompts,
        max_tokens=TOKENS,
        max_num_batched_tokens=24,
        max_model_len=192,
        num_gpu_blocks_override=9,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
    )
    assert result["tokens"] == [expected] * 2
    assert result["metrics"]["vllm:num_preemptions"] > 0
    assert result["metrics"]["vllm:prefix_cache_hits"] > 0
    assert result["metrics"]["vllm:spec_decode_num_draft_tokens"] > 0


def test_what_layers_that_share_cannot_do_is_refused(base_model: Path, tmp_path: Path) -> None:
    kv = "method: xkv, group: 2, rank: 0.5"
    for name, xkv in (("kv", kv), ("prompt", f"{kv}, basis: prompt"), ("ends", f"{kv}, sink: 4")):
        compress(base_model, tmp_path / name, listed(xkv))
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}
    expected = [
        ({"model": str(tmp_path / "prompt")}, "finds its basis in each prompt (xkv with basis: prompt)"),
        ({"model": str(tmp_path / "ends")}, "keeps the first 4 and the newest 0 tokens as they are"),
        ({"model": str(tmp_path / "kv"), "hf_overrides": rope}, "made for another rotary embedding (RoPE)"),
    ]
    found = vllm_engine.refusals(*[attempt for attempt, _ in expected])
    for (attempt, reason), message in zip(expected, found, strict=True):
        assert reason in message, (attempt, message)
