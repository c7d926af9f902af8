from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvcompress.checkpoint import completeness
from kvcompress.checkpoint.finite import check_finite
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.model_config import parse
from tests import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_model(tmp_path / "model")


def edit(folder: Path, config: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> Checkpoint:
    path = folder / "model.safetensors"
    left = load_file(path)
    for name, tensor in tensors.items():
        left.pop(name, None)
        if tensor is not None:
            left[name] = tensor
    save_file(left, path, {"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | (config or {})))
    return Checkpoint.open(folder)


def complete(checkpoint: Checkpoint) -> None:
    completeness.check_complete(checkpoint, parse(checkpoint.config))


def test_a_whole_model(folder: Path) -> None:
    complete(Checkpoint.open(folder))
    check_finite(Checkpoint.open(folder))


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.3.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"has no (tensor )?{name}"):
        complete(edit(folder, **{name: None}))


def test_a_head_that_is_tied_need_not_be_there(folder: Path) -> None:
    complete(edit(folder, {"tie_word_embeddings": True}, **{"lm_head.weight": None}))


def test_shapes_and_layers_that_config_json_does_not_have(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"k_proj.weight has shape \[64, 128\], and config.json asks for \[128, 128\]"):
        complete(edit(folder, {"num_key_value_heads": 4}))
    with pytest.raises(ValueError, match=r"'model.layers.3.*num_hidden_layers 3"):
        complete(edit(folder, {"num_key_value_heads": 2, "num_hidden_layers": 3}))


def test_names_without_their_prefix(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="another prefix"):
        complete(Checkpoint.open(folder))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_value_that_is_no_number(folder: Path, dtype: torch.dtype, value: float) -> None:
    weight = torch.full((70, 3), -1.5)
    weight[69, 2] = value
    if dtype == torch.float8_e4m3fn:
        weight[69, 2] = float("nan")  # it has no infinities
    check_finite(edit(folder, **{"model.norm.weight": torch.full((70, 3), -448.0).to(dtype)}))
    with pytest.raises(ValueError, match=r"'model.norm.weight' holds 1 values .* of 210"):
        check_finite(edit(folder, **{"model.norm.weight": weight.to(dtype)}))
