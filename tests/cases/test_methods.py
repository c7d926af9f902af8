"""Models with parts that carry nothing, weights in mixed dtypes, and numbers that are too large or none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvcompress.checkpoint.manifest import Manifest
from kvcompress.codec.spec import CodecSpec
from kvcompress.serving.loading import load_statement
from kvcompress.serving.transformers import CompressedCache, prepare
from tests import compression, tiny

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
    text = "".join(f"  - {stage}\n" for stage in stages)
    compression.compress(base, out, text, **OPTIONS | options)
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


ATTENTION = "model.layers.1.self_attn."
HEAD = tiny.HEAD_DIM
GROUP = tiny.NUM_HEADS // tiny.NUM_KV_HEADS


def zeroed(*parts: str, rows: slice = slice(None), columns: slice = slice(None)) -> Callable[[dict[str, Tensor]], None]:
    """An edit after which these projections of layer 1 give nothing, or not what these rows or columns would."""

    def change(tensors: dict[str, Tensor]) -> None:
        for part in parts:
            tensors[f"{ATTENTION}{part}_proj.weight"][rows, columns] = 0

    return change


SILENT = {
    "o": zeroed("o"),
    "q": zeroed("q"),
    "k": zeroed("k"),
    "v": zeroed("v"),
    "all": zeroed("q", "k", "v", "o"),
    "o of a head": zeroed("o", columns=slice(GROUP * HEAD)),
    "v of a head": zeroed("v", rows=slice(HEAD)),
    "a channel of v": zeroed("v", rows=slice(5, 6)),
}
XKV = "{method: xkv, group: 2, rank: 0.5}"


@pytest.mark.parametrize(
    ("part", "stages"),
    [
        ("o", [PCA, BUDGET]),
        ("o", [XKV, BITS]),
        ("o", ["{method: matryoshka, steps: 2, batch: 2, samples: 4, length: 32}", BITS]),
        ("q", [PCA, BUDGET]),
        ("q", ["{method: fwsvd, removed: 0.3}", PCA, BITS]),
        ("v", [PCA, "{method: scalar, target_bits_per_channel: {k: 3.0, v: 3.0}, outliers: {k: 2, v: 1}}"]),
        ("v", [XKV, BITS]),
        ("v", [PCA, "{method: gear, bits: 4, block: 32, group: 16}"]),
        ("all", ["{method: fwsvd, removed: 0.3}", PCA, BUDGET]),
        ("all", ["{method: transmla, rope_dim: 32, kv_lora_rank: 48, freqfold: 1}"]),
        ("o of a head", [PCA, BUDGET]),
        ("v of a head", [XKV, BITS]),
        ("a channel of v", [PCA, BUDGET]),
    ],
)
def test_parts_that_carry_nothing_are_no_trouble(part: str, stages: list[str], tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    edit(base, SILENT[part])
    out = compressed(base, tmp_path / "out", *stages)
    errors = [layer["relative_error"] for layer in Manifest.load(out).layers if "relative_error" in layer]
    assert all(math.isfinite(error) for error in errors)
    if part in ("o", "v", "all"):
        assert errors[1:] in ([0.0], [])  # what adds nothing to the model loses nothing
    if (statement := load_statement(out)) is not None:
        for stated in statement.layers[1].values():  # type: ignore[union-attr]
            assert bool((stated.error_H < 1.1).all())
    for tensors in (load_file(path) for path in out.rglob("*.safetensors")):
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    loaded = tiny.load_model(out)
    caches = [None] if "transmla" in stages[0] else [None, CompressedCache.from_pretrained(out)]
    for cache in caches:
        if cache is not None:
            prepare(loaded, cache)
        with torch.no_grad():
            logits = [loaded(step, past_key_values=cache).logits for step in torch.arange(2, 60)[None].split(40, dim=1)]
        assert all(bool(one.isfinite().all()) for one in logits)


@pytest.mark.parametrize(
    ("tensor", "number", "stages"),
    [
        ("model.layers.1.self_attn.k_proj.weight", math.nan, [PCA, BITS]),
        ("model.layers.0.input_layernorm.weight", math.inf, [XKV, BITS]),
        ("model.layers.1.mlp.down_proj.weight", math.nan, ["{method: transmla, rope_dim: 32, kv_lora_rank: 48}"]),
        (
            "model.layers.1.mlp.up_proj.weight",
            math.inf,
            ["{method: transmla, rope_dim: 32, kv_lora_rank: 48}", "{method: heal, steps: 2}"],
        ),
        ("model.norm.weight", math.nan, ["{method: fwsvd, weighting: fisher}"]),
        ("model.embed_tokens.weight", -math.inf, [PCA, BITS]),
    ],
)
def test_weights_that_are_not_finite_are_named(tensor: str, number: float, stages: list[str], tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    edit(base, lambda tensors: tensors[tensor].view(-1)[7:8000].fill_(number))
    with pytest.raises(ValueError, match=f"'{tensor.replace('.', '[.]')}' holds .* infinite or not a number"):
        compressed(base, tmp_path / "out", *stages)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stages", [[PCA, BITS], ["{method: fwsvd, weighting: activation}"]])
def test_an_overflow_names_layer_module_and_remedy(stages: list[str], tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    edit(base, lambda tensors: tensors[f"{ATTENTION}v_proj.weight"].mul_(30000))
    with pytest.raises(ValueError, match=r"^layer 1: the output of self_attn\.v_proj overflows float16.* --dtype"):
        compressed(base, tmp_path / "float16", *stages, dtype="float16")
    compressed(base, tmp_path / "out", *stages, dtype="float32")


@pytest.mark.parametrize(
    ("narrow", "dtype", "stages"),
    [
        ("weight", "float32", ["{method: fwsvd, weighting: fisher+activation}", XKV, BITS]),
        ("weight", "bfloat16", [PCA, BITS]),
        ("bias", "float32", ["{method: transmla, rope_dim: 32, kv_lora_rank: 48, freqfold: 1}"]),
        ("bias", "bfloat16", ["{method: fwsvd, weighting: fisher+activation}", XKV, BITS]),
        ("norm", "bfloat16", [PCA, BITS]),
        ("norm", "float16", ["{method: fwsvd, weighting: activation}", PCA, BITS]),
    ],
)
def test_weights_biases_and_norms_of_different_dtypes(
    narrow: str, dtype: str, stages: list[str], tmp_path: Path
) -> None:
    base = model(tmp_path / "base", "Qwen3" if narrow == "norm" else "Qwen2")

    def change(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if ("norm" if "norm" in name else name.rpartition(".")[2]) == narrow:
                tensors[name] = tensors[name].bfloat16()

    edit(base, change)
    out = compressed(base, tmp_path / "out", *stages, dtype=dtype)
    assert Manifest.load(out).weights_bytes.base == sum(
        tensor.nbytes for tensor in load_file(base / "model.safetensors").values()
    )
    with torch.no_grad():
        assert bool(tiny.load_model(out)(torch.arange(2, 40)[None]).logits.isfinite().all())
