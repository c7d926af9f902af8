"""Weights that the base model quantizes, in transformers: loaded as stored, then dequantized to the model's dtype.

Any machine can run them so, without the packages and kernels that transformers asks for where a model is quantized;
they take the memory of an unquantized model, and activations are not quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvcompress.checkpoint import quantized
from kvcompress.checkpoint.safetensors_file import read_header, torch_dtype

_UNUSED = {r"\.(input|output|[qkv])_(scale|zero_point)$"}
"""Tensors beside the weights that a model without quantized activations has no use for."""


def expect(model: Any, files: Iterable[str], section: Mapping[str, Any]) -> None:
    """Give linear layers, still without data, what the files hold for them: the weight as stored, and its scales.

    Args:
        model: on the meta device.
        files: of the checkpoint.
        section: the base model's quantization_config.

    Raises:
        ValueError: weights are quantized in a way that we do not read.
    """
    quantized.check_section(section)
    tensors = {name: info for file in files for name, info in read_header(Path(file)).tensors.items()}
    modules = dict(model.named_modules())
    for name, scale in quantized.scales_of(tensors).items():
        path = name.rpartition(".")[0]
        linear = modules.get(path) or modules.get(path.removeprefix(f"{model.base_model_prefix}."))
        if not isinstance(linear, nn.Linear):
            continue  # the rest of the model it is part of; transformers says what it does not use
        stored = torch_dtype(Path(tensors[name].file), tensors[name])
        linear.weight = _empty(tensors[name].shape, stored)
        # Scales keep their precision whatever the model's dtype.
        linear.register_parameter(scale.rpartition(".")[2], _empty(tensors[scale].shape, torch.float32))
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *_UNUSED}


def dequantize(model: nn.Module, dtype: torch.dtype, section: Mapping[str, Any]) -> None:
    """Make ordinary linear layers of those that `expect` has prepared.

    Raises:
        ValueError: scales that do not fit their weight.
    """
    for name, module in model.named_modules():
        for scale in quantized.SCALES:
            if isinstance(module, nn.Linear) and hasattr(module, scale):
                found = quantized.dequantize(name, module.weight, getattr(module, scale), quantized.block_of(section))
                module.weight = nn.Parameter(found.to(dtype))
                delattr(module, scale)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
