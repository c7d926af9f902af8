"""A compressed cache on a base model whose own weights are quantized: vLLM runs those as it would without us.

vLLM's CPU platform serves 8-bit integer weights with 8-bit activations (W8A8). Its float8 kernels need AMX or a GPU.

With W8A8, changing activations by a millionth moves a few of them to the next code, those move more in the next layer,
and the logits of these models end up 0.03 to 0.1 standard deviations away: in transformers against itself as between
engines. So engines are compared by their logits after the same tokens, and by tokens where the lead is clear.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from kvcompress.serving.transformers import CompressedCache, prepare
from tests import compression, quantize, require, tiny
from tests.e2e import reference, vllm_engine

require.need("vllm")
pytestmark = pytest.mark.e2e

PROMPTS = tiny.prompts([3, 33, 130])
TOKENS = 24
ERROR = 0.15
"""Largest difference between two engines' logits after a prompt: root mean square, in standard deviations."""

CLEAR = 0.5
"""Lead of the best logit over the second, in standard deviations, that no such difference turns around."""


def quantized(folder: Path, architecture: str = "Llama", **config: Any) -> Path:
    base = tiny.save_model(folder / "base", architecture, vocab_size=300, **config)
    tiny.save_tokenizer(base)
    return quantize.save(base, folder / "quantized", quantize.int8, quantize.int8_config(quantize.PER_TOKEN))


def compressed(base: Path, out: Path, stages: str) -> Path:
    compression.compress(base, out, stages, samples=4, length=64)
    return out


@torch.no_grad()
def transformers_logits(model: Path, answers: list[list[int]], cache: Callable[[], Cache]) -> list[Tensor]:
    """Logits `[tokens, vocabulary]` after each prompt and the answers' tokens before, activations in 8 bits as well."""
    loaded = tiny.load_model(model)
    reference.limit_windows(loaded)
    quantize.round_activations(loaded)
    found = []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        past = cache()
        prepare(loaded, past)
        steps = [prompt, *([token] for token in answer[:-1])]
        logits = [loaded(torch.tensor([step]), past_key_values=past, use_cache=True).logits[0, -1] for step in steps]
        found.append(torch.stack(logits))
    return found


def assert_agree(found: list[list[list[float]]], answers: list[list[int]], expected: list[Tensor]) -> None:
    clear = 0
    for logits, answer, reference_TV in zip(found, answers, expected, strict=True):
        deviation = reference_TV.std()
        error = (torch.tensor(logits) - reference_TV).square().mean().sqrt() / deviation
        assert error < ERROR
        first_T2 = reference_TV.topk(2).values
        leads_T = (first_T2[:, 0] - first_T2[:, 1]) / deviation > CLEAR
        clear += int(leads_T.sum())
        assert torch.tensor(answer)[leads_T].tolist() == reference_TV.argmax(-1)[leads_T].tolist()
    assert clear > 5, "hardly any token was compared"


@pytest.mark.parametrize(
    ("architecture", "stages"),
    [
        ("Llama", "  - method: pca\n    rank: {k: 1.0, v: 0.75}\n  - method: scalar\n    bits: {k: 8, v: 4}\n"),
        ("Qwen2", "  - method: gear\n"),
        ("Qwen3", "  - method: xkv\n    group: 2\n  - method: scalar\n    bits: 8\n"),
    ],
)
def test_same_answers_as_transformers(architecture: str, stages: str, tmp_path: Path) -> None:
    model = compressed(quantized(tmp_path, architecture), tmp_path / "out", stages)
    result = vllm_engine.run(model, PROMPTS, max_tokens=TOKENS, block_size=64, logits=True)
    expected = transformers_logits(model, result["tokens"][0], lambda: CompressedCache.from_pretrained(model))
    assert_agree(result["logits"][0], result["tokens"][0], expected)
    assert "start-up canary passed" in result["log"]


def test_layers_without_a_codec_are_the_base_s_too(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"] * (tiny.NUM_LAYERS // 2)
    base = quantized(tmp_path, sliding_window=40, layer_types=kinds)
    model = compressed(base, tmp_path / "out", "  - method: pca\n  - method: scalar\n    bits: 8\n")
    result = vllm_engine.run(model, PROMPTS, max_tokens=TOKENS, logits=True)
    expected = transformers_logits(model, result["tokens"][0], lambda: CompressedCache.from_pretrained(model))
    assert_agree(result["logits"][0], result["tokens"][0], expected)
    assert "sliding window of 40" in result["log"]


def test_stock_vllm_and_a_lossless_codec_answer_alike(tmp_path: Path) -> None:
    """And `dequantize` is what stock vLLM makes of the weights: the reference here is transformers' plain cache."""
    base = quantized(tmp_path)
    model = compressed(base, tmp_path / "out", "  - method: pca\n    metric: none\n  - method: scalar\n    bits: 32\n")
    for folder in (base, model):
        result = vllm_engine.run(folder, PROMPTS, max_tokens=TOKENS, logits=True)
        expected = transformers_logits(model, result["tokens"][0], DynamicCache)
        assert_agree(result["logits"][0], result["tokens"][0], expected)
