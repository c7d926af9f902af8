"""Every method, and combinations: from the command line through vLLM and back; and where nothing is cut, no change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer.testing
from kvcompress_cli.main import app
from transformers import AutoModelForCausalLM

from kvcompress.checkpoint.manifest import Manifest
from kvcompress.methods import fwsvd
from kvcompress.methods.ranks import Ranks, Shape
from kvcompress.serving.transformers import CompressedCache, prepare
from tests import require, tiny
from tests.e2e import reference, vllm_engine

require.need("vllm")
pytestmark = pytest.mark.e2e

LENGTHS, TOKENS, BLOCK = [3, 70, 130], 16, 32
TRAINING = "steps: 4, batch: 2, samples: 8, length: 64"
FACTORED = "{method: fwsvd, removed: 0.2, ranks: error}"
CHANNELS = tiny.NUM_KV_HEADS * tiny.HEAD_DIM

LOSSY = {
    "pca": ["{method: pca, rank: 0.75}", "{method: scalar, bits: 16}"],
    "scalar": ["{method: scalar, target_bits_per_channel: {k: 4.5, v: 3.5}}"],
    "matryoshka": [f"{{method: matryoshka, rank: 0.75, {TRAINING}}}", "{method: scalar, bits: 8}"],
    "xkv": ["{method: xkv, group: 2, rank: 0.75}", "{method: scalar, bits: 8}"],
    "gear": ["{method: gear, bits: 4, block: 32, group: 32}"],
    "transmla": ["{method: transmla, rope_dim: 32, kv_lora_rank: 48, freqfold: 1}"],
    "fwsvd": [FACTORED],
    "fwsvd + pca + scalar": [FACTORED, "{method: pca}", "{method: scalar, target_bits_per_channel: 4.5}"],
    "matryoshka + gear": [f"{{method: matryoshka, rank: 0.5, {TRAINING}}}", "{method: gear, bits: 4, block: 32}"],
    "xkv (v) + scalar": ["{method: xkv, share: v, group: 2, rank: 0.75}", "{method: scalar, bits: {k: 8, v: 4}}"],
    "transmla + heal": [
        "{method: transmla, rope_dim: 32, kv_lora_rank: 48, freqfold: 1}",
        f"{{method: heal, {TRAINING}}}",
    ],
}

EXACT = "{method: scalar, bits: 32}"
LOSSLESS = {
    "pca": ["{method: pca}", EXACT],
    "scalar": [EXACT],
    "matryoshka": [f"{{method: matryoshka, rank: 1.0, {TRAINING}}}", EXACT],
    "xkv": ["{method: xkv, group: 2, rank: 1.0}", EXACT],
    "gear": ["{method: gear, bits: 8, outliers: 1.0, block: 32, group: 32}"],
    "transmla": [f"{{method: transmla, rope_dim: {CHANNELS}, kv_lora_rank: {CHANNELS}, freqfold: 1}}"],
    "fwsvd": ["{method: fwsvd, removed: 0.1, ranks: uniform}"],
}


def command(*arguments: object) -> None:
    result = typer.testing.CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def compress(base: Path, folder: Path, stages: list[str]) -> Path:
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"version: 1\nstages: [{', '.join(stages)}]\n")
    command("compress", base, "--recipe", recipe, "--out", folder / "out", "--samples", 8)
    return folder / "out"


@pytest.mark.parametrize("method", LOSSY)
def test_compressed_verified_served_and_back(method: str, base_model: Path, tmp_path: Path) -> None:
    model = compress(base_model, tmp_path, LOSSY[method])
    command("verify", model)
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

    command("decompress", model, "--out", tmp_path / "plain")
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


def compress_nothing(method: str, base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a method of `LOSSLESS`."""

    def full(shapes: list[Shape], removed: float) -> Ranks:
        return [min(shape.out_features, shape.in_features) for shape in shapes]

    monkeypatch.setattr(fwsvd, "uniform", full)
    return compress(base, folder, LOSSLESS[method])


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
