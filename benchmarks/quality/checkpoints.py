"""Our lines of the table: compressed checkpoints, made by the command a user would type where they are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvcompress_eval.models import MANIFEST, codec_spec, fingerprint, read_config

from kvcompress.codec.blocks.spec import BlocksSpec
from kvcompress.codec.spec import CodecSpec
from kvcompress.geometry import ModelGeometry
from kvcompress.methods import registry
from kvcompress.serving.transformers import CompressedCache

from .measure import Candidate
from .rows import ELEMENT_BYTES, Row

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "recipes"


def compressed(base: Path, recipe: str, work: Path, options: Sequence[str] = ()) -> Path:
    """The checkpoint of an example recipe, or of a recipe file, in `work`; made if it is not there.

    Args:
        options: more words for the command line.

    Raises:
        ValueError: no such recipe, or the command failed.
    """
    path = Path(recipe) if recipe.endswith(".yaml") else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(found.stem for found in RECIPES.glob("*.yaml")))
        raise ValueError(f"no recipe {recipe}; expected one of {names}, a .yaml file or a compressed checkpoint")
    out = work / path.stem
    if not out.is_dir():
        words = ["compress", str(base), "--recipe", str(path), "--out", str(out), "--resume", *options]
        print(f"$ kvcompress {' '.join(words)}", flush=True)
        if subprocess.run([sys.executable, "-m", "kvcompress_cli", *words], env=os.environ, check=False).returncode:
            raise ValueError(f"kvcompress compress failed for {path}; its message is above")
    return out


def our_row(name: str, folder: Path, model: Any) -> Row:
    """A compressed checkpoint; `model` is its loaded base."""
    config = read_config(folder)
    checkpoint = Compressed(folder, model)
    geometry, spec = ModelGeometry.from_config(config), codec_spec(config)
    return Row(
        name,
        True,
        f"{name} {fingerprint(folder)}",
        lambda: Candidate(checkpoint.model, checkpoint.new_cache),
        lambda length: stored_bytes(geometry, spec, length),
        lambda length: 1 if spec is None else len(checkpoint.new_cache().scoring_steps(length, length)),
    )


def stored_bytes(geometry: ModelGeometry, spec: CodecSpec | None, length: int) -> float:
    """Bytes per token over all layers of a context of `length` tokens, with what requests keep exactly beside it.

    Of a cache in blocks, half a block is open on average.
    """
    total = 0.0
    for index, layer in enumerate([None] * geometry.num_layers if spec is None else spec.layers):
        plain = geometry.layer_kv_bytes_per_token(index, ELEMENT_BYTES)
        if layer is None:
            total += plain
        elif isinstance(layer, BlocksSpec):
            open_share = min(1, layer.block / 2 / length)
            total += plain * open_share + layer.bytes_per_token * (1 - open_share)
        else:
            total += layer.bytes_per_token + getattr(layer, "bytes_per_request", 0) / length
    return total


@dataclass(frozen=True)
class Compressed:
    """A compressed checkpoint; runs on the base's weights where its recipe did not change them."""

    folder: Path
    base: Any

    @cached_property
    def model(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        stages = json.loads((self.folder / MANIFEST).read_text())["recipe"]["stages"]
        if {registry.METHODS[stage["method"]].kind for stage in stages} <= {"basis", "encoding"}:
            return self.base
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @cached_property
    def codecs(self) -> Any:
        from kvcompress.serving.loading import load_codec

        return load_codec(self.folder)

    def new_cache(self) -> Any:
        """An empty cache; None where the codec is in the weights, as `transmla`'s."""
        return CompressedCache(self.codecs) if codec_spec(read_config(self.folder)) is not None else None
