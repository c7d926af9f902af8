"""Every method, and combinations: recipes that lose something, and recipes that cut nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcompress.methods import fwsvd
from kvcompress.methods.ranks import Ranks, Shape
from tests import command, tiny

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


def compress(base: Path, folder: Path, stages: list[str]) -> Path:
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"version: 1\nstages: [{', '.join(stages)}]\n")
    assert command.call("compress", base, "--recipe", recipe, "--out", folder / "out", "--samples", 8) == 0
    return folder / "out"


def compress_nothing(method: str, base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a method of `LOSSLESS`."""

    def full(shapes: list[Shape], removed: float) -> Ranks:
        return [min(shape.out_features, shape.in_features) for shape in shapes]

    monkeypatch.setattr(fwsvd, "uniform", full)
    return compress(base, folder, LOSSLESS[method])
