"""Models with parts that carry nothing, weights in mixed dtypes, and numbers that are too large or none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvcompress import recipe as recipes
from kvcompress.checkpoint.manifest import Manifest
from kvcompress.codec.spec import CodecSpec
from kvcompress.methods import registry
from kvcompress.pipeline import compress as compressing
from kvcompress.serving.transformers import CompressedCache, prepare
from tests import tiny

OPTIONS = {"samples": 4, "length": 64}
PCA = "{method: pca}"
BITS = "{method: scalar, bits: 4}"
BUDGET = "{method: scalar, target_bits_per_channel: 3.0}"


def model(folder: Path, architecture: str = "Llama", **config: Any) -> Path:
    base = tiny.save_model(folder, architecture, vocab_size=300, num_hidden_layers=2, **config)
    tiny.save_tokenizer(base)
    return base


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def compressed(base: Path, out: Path, *stages: str, **options: Any) -> Path:
    text = "version: 1\nstages:\n" + "".join(f"  - {stage}\n" for stage in stages)
    recipe = recipes.parse(text, registry.schemas())
    compressing.compress(str(base), recipe, out, compressing.Options(**OPTIONS | options), lambda *_: None)
    return out


@torch.no_grad()
def cached_bytes(out: Path, tokens: int) -> int:
    """Bytes of a cache that has seen so many tokens."""
    loaded, cache = tiny.load_model(out), CompressedCache.from_pretrained(out)
    prepare(loaded, cache)
    loaded(torch.arange(2, 2 + tokens)[None] % 300, past_key_values=cache)
    return cache.nbytes


@pytest.mark.parametrize(
    "stages",
    [
        [PCA, "{method: scalar, bits: {k: 4, v: 2}, outliers: {k: 2, v: 1}}"],
        ["{method: xkv, group: 2, rank: 0.5}", "{method: scalar, bits: 4, outliers: {k: 1, v: 1}}"],
        ["{method: xkv, group: 2, rank: 0.5, share: v}", "{method: scalar, bits: 4, outliers: {k: 1, v: 2}}"],
        [PCA, "{method: gear, bits: 4, block: 32, group: 16}"],
    ],
)
def test_a_cache_takes_the_bytes_that_the_manifest_counts(stages: list[str], tmp_path: Path) -> None:
    out = compressed(model(tmp_path / "base"), tmp_path / "out", *stages)
    manifest, config = Manifest.load(out), json.loads((out / "config.json").read_text())
    spec = CodecSpec.from_json(config["quantization_config"]["codec"])
    assert sum(layer.bytes_per_token for layer in spec.layers if layer) == manifest.bytes_per_token.compressed
    assert cached_bytes(out, 64) == 64 * manifest.bytes_per_token.compressed
