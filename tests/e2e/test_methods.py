"""Every method, and combinations: from the command line through vLLM and back; and where nothing is cut, no change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvcompress.checkpoint.manifest import Manifest
from kvcompress.serving.transformers import CompressedCache, prepare
from tests import command, require, tiny
from tests.e2e import reference, vllm_engine
from tests.e2e.method_recipes import LOSSLESS, LOSSY, compress, compress_nothing

require.need("vllm")
pytestmark = pytest.mark.e2e

LENGTHS, TOKENS, BLOCK = [3, 70, 130], 16, 32


@pytest.mark.parametrize("method", LOSSY)
def test_compressed_verified_served_and_back(method: str, base_model: Path, tmp_path: Path) -> None:
    model = compress(base_model, tmp_path, LOSSY[method])
    assert command.call("verify", model) == 0
    hits = [(length - 1) // BLOCK * BLOCK for length in LENGTHS]
    found = [
        reference.answers(model, length, [hit] if hit else [], TOKENS)
        for length, hit in zip(LENGTHS, hits, strict=True)
    ]
    prompts = [prompt for prompt, _ in found]
    served = vllm_engine.run(model, prompts, prompts, max_tokens=TOKENS)
    assert served["cached"] == [[0] * len(LENGTHS), hits]
    assert served["tokens"] == [[whole for _, (whole, *_) in found], [cut for _, (*_, cut) in found]]
    sizes = Manifest.load(model)
    assert sizes.bytes_per_token.compressed < sizes.bytes_per_token.base or method == "fwsvd"
    assert sizes.weights_bytes.compressed < sizes.weights_bytes.base or "fwsvd" not in method

    assert command.call("decompress", model, "--out", tmp_path / "plain") == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert not hasattr(plain.config, "quantization_config")


Answers = tuple[list[list[int]], list[list[int]], torch.Tensor]
"""Prompts, greedy tokens, and vLLM's logits of these for every pass over the prompts."""


@pytest.fixture(scope="module")
def base_answers(base_model: Path) -> Answers:
    prompts, tokens = reference.greedy(base_model, LENGTHS, TOKENS)
    return prompts, tokens, _served_logits(base_model, prompts)


@pytest.mark.parametrize("method", LOSSLESS)
def test_logits_are_the_base_models_where_nothing_is_cut(
    method: str, base_model: Path, base_answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At full rank, in floats or with every entry exact: logits within 1e-3, in transformers and in vLLM."""

    model = compress_nothing(method, base_model, tmp_path, monkeypatch)
    prompts, tokens, expected = base_answers
    for prompt, answer in zip(prompts, tokens, strict=True):
        ids = torch.tensor([prompt + answer])
        base, ours = (_logits(path, ids) for path in (base_model, model))
        torch.testing.assert_close(ours, base, rtol=0.0, atol=1e-3)
    torch.testing.assert_close(_served_logits(model, prompts), expected, rtol=0.0, atol=1e-3)


def _served_logits(model: Path, prompts: list[list[int]]) -> torch.Tensor:
    """vLLM's, of prompts fed in pieces and then again from the prefix cache `[passes, prompts, tokens, vocabulary]`."""
    served = vllm_engine.run(model, prompts, prompts, max_tokens=TOKENS, max_num_batched_tokens=24, logits=True)
    assert served["metrics"]["vllm:prefix_cache_hits"] > 0
    return torch.tensor(served["logits"])


@torch.no_grad()
def _logits(path: Path, ids_1T: torch.Tensor) -> torch.Tensor:
    """Of every token, fed in two steps, so that the second reads the first from the cache."""
    model, half = tiny.load_model(path), ids_1T.shape[1] // 2
    cache = None
    if hasattr(model.config, "quantization_config"):
        cache = CompressedCache.from_pretrained(path)
        prepare(model, cache)
    first = model(ids_1T[:, :half], past_key_values=cache, use_cache=True)
    second = model(ids_1T[:, half:], past_key_values=first.past_key_values, use_cache=True)
    found: torch.Tensor = torch.cat([first.logits, second.logits], 1)
    return found
