"""Stores the linear weights of a saved model in 8 bits, in the layouts that other tools write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
PER_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}

Quantizer = Callable[[Tensor], dict[str, Tensor]]
"""A weight `[out, in]` as tensors by the last part of their names."""


def int8_config(activations: dict[str, Any] | None = None) -> dict[str, Any]:
    """W8A16 as compressed-tensors writes it, or W8A8 with `activations`."""
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "dynamic": False, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def int8(weight_OI: Tensor) -> dict[str, Tensor]:
    """One scale per output."""
    scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight_OI / scale_O1).round().to(torch.int8), "weight_scale": scale_O1}


def fp8(weight_OI: Tensor) -> dict[str, Tensor]:
    """One scale for the matrix."""
    scale = weight_OI.abs().max() / 448
    return {"weight": (weight_OI / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def fp8_blocks(rows: int, columns: int) -> Quantizer:
    """One scale per block; the last ones may be smaller."""

    def quantize(weight_OI: Tensor) -> dict[str, Tensor]:
        outputs, inputs = weight_OI.shape
        stored_OI = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn)
        scale_AB = torch.empty(-(-outputs // rows), -(-inputs // columns))
        for a, b in torch.cartesian_prod(*map(torch.arange, scale_AB.shape)).tolist():
            place = slice(a * rows, (a + 1) * rows), slice(b * columns, (b + 1) * columns)
            scale_AB[a, b] = weight_OI[place].abs().max() / 448
            stored_OI[place] = (weight_OI[place] / scale_AB[a, b]).to(torch.float8_e4m3fn)
        return {"weight": stored_OI, "weight_scale_inv": scale_AB}

    return quantize


def save(base: Path, directory: Path, quantize: Quantizer, config: dict[str, Any]) -> Path:
    """A copy of a saved model in which every linear weight of the decoder layers is quantized."""
    shutil.copytree(base, directory)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{part}": stored for part, stored in quantize(tensor).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    edit_config(directory, quantization_config=config)
    return directory


def edit_config(directory: Path, **entries: Any) -> None:
    """Change entries of a folder's config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def round_activations(model: torch.nn.Module) -> None:
    """Have the decoder layers' linear layers see their inputs in 8 bits per token, as W8A8 kernels do."""

    def rounded(_: torch.nn.Module, inputs: tuple[Tensor]) -> Tensor:
        scale = inputs[0].abs().amax(-1, keepdim=True).clamp_min(1e-10) / 127
        return (inputs[0] / scale).round() * scale

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(rounded)
