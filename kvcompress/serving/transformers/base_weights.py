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


def expect(model: Any, files: Iterable[str], section: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """Give linear layers, still without data, what the files hold for them: the weight as stored, and its scales.

    Args:
        model: on the meta device.
        files: of the checkpoint.
        section: the base model's quantization_config.

    Returns:
        The dtypes that these layers had, by their names, for `dequantize`.

    Raises:
        ValueError: weights are quantized in a way that we do not read.
    """
    quantized.check_section(section)
    tensors = {name: info for file in files for name, info in read_header(Path(file)).tensors.items()}
    modules, dtypes = dict(model.named_modules()), {}
    for name, scale in quantized.scales_of(tensors).items():
        path = name.rpartition(".")[0]
        path = path if path in modules else path.removeprefix(f"{model.base_model_prefix}.")
        linear = modules.get(path)
        if not isinstance(linear, nn.Linear):
            continue  # of a part that this model class leaves out
        dtypes[path] = linear.weight.dtype
        linear.weight = _empty(tensors[name].shape, torch_dtype(Path(tensors[name].file), tensors[name]))
        # Scales keep their precision whatever the model's dtype.
        linear.register_parameter(scale.rpartition(".")[2], _empty(tensors[scale].shape, torch.float32))
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *_UNUSED}
    return dtypes


def dequantize(model: nn.Module, dtypes: Mapping[str, torch.dtype], section: Mapping[str, Any]) -> None:
    """Make ordinary linear layers of those that `expect` has prepared.

    Raises:
        ValueError: scales that do not fit their weight.
    """
    block = quantized.block_of(section)
    for name, dtype in dtypes.items():
        linear: Any = model.get_submodule(name)
        scale = next(scale for scale in quantized.SCALES if hasattr(linear, scale))
        weight_OI = quantized.dequantize(f"{name}.weight", linear.weight.data, getattr(linear, scale).data, block)
        linear.weight = nn.Parameter(weight_OI.to(dtype))
        delattr(linear, scale)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
