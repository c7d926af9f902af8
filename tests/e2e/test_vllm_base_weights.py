"""A compressed cache on a base model whose own weights are quantized: vLLM runs those as it would without us.

vLLM's CPU platform serves 8-bit integer weights with 8-bit activations (W8A8). Its float8 kernels need AMX or a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcompress import recipe as recipes
from kvcompress.methods import registry
from kvcompress.pipeline import compress as compressing
from tests import quantize, tiny
from tests.e2e import reference, vllm_engine

pytest.importorskip("vllm")
pytestmark = pytest.mark.e2e

LENGTHS = [3, 33, 130]


def bases(folder: Path, architecture: str) -> Path:
    base = tiny.save_model(folder / "base", architecture, vocab_size=300)
    tiny.save_tokenizer(base)
    return quantize.save(base, folder / "quantized", quantize.int8, quantize.int8_config(quantize.PER_TOKEN))


def compressed(base: Path, out: Path, stages: str) -> Path:
    recipe = recipes.parse(f"version: 1\nstages:\n{stages}", registry.schemas())
    compressing.compress(str(base), recipe, out, compressing.Options(samples=4, length=64), lambda *_: None)
    return out


@pytest.mark.parametrize(
    ("architecture", "stages"),
    [
        ("Llama", "  - method: pca\n    rank: {k: 1.0, v: 0.75}\n  - method: scalar\n    bits: {k: 8, v: 4}\n"),
        ("Qwen2", "  - method: pca\n  - method: gear\n"),
        ("Qwen3", "  - method: xkv\n  - method: scalar\n    bits: 8\n"),
    ],
)
def test_same_tokens_as_transformers(architecture: str, stages: str, tmp_path: Path) -> None:
    """Activations are rounded in the reference as well, by hooks of the test's own."""
    model = compressed(bases(tmp_path, architecture), tmp_path / "out", stages)
    prompts, expected = reference.greedy(model, LENGTHS, 48, alter=quantize.round_activations)
    result = vllm_engine.run(model, prompts, prompts, max_tokens=48)
    assert result["tokens"] == [expected] * 2
    assert result["metrics"]["vllm:prefix_cache_hits"] > 0


def test_a_lossless_codec_leaves_stock_vllm_s_tokens(tmp_path: Path) -> None:
    base = bases(tmp_path, "Llama")
    model = compressed(base, tmp_path / "out", "  - method: pca\n    metric: none\n  - method: scalar\n    bits: 32\n")
    prompts, expected = reference.greedy(model, LENGTHS, 48, alter=quantize.round_activations)
    assert vllm_engine.run(base, prompts, max_tokens=48)["tokens"] == [expected]
    assert vllm_engine.run(model, prompts, max_tokens=48)["tokens"] == [expected]
