"""A model's codec in codec.safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvcompress.codec.contract import CacheCodec
from kvcompress.codec.spec import CacheSpec, CodecSpec
from kvcompress.forms import FORMS


def to_tensors(codecs: Sequence[CacheCodec | None]) -> dict[str, Tensor]:
    """Every tensor under the name it has in codec.safetensors: `layers.{index}.{name}`."""
    return {
        f"layers.{index}.{name}": tensor.contiguous()
        for index, codec in enumerate(codecs)
        if codec is not None
        for name, tensor in codec.tensors().items()
    }


def from_tensors(spec: CodecSpec, tensors: Mapping[str, Tensor]) -> list[CacheCodec | None]:
    """Build every layer's codec from codec.safetensors.

    Raises:
        ValueError: a tensor is missing, has another shape than the spec says, or is not finite and usable.
    """
    return [None if layer is None else _layer(index, layer, tensors) for index, layer in enumerate(spec.layers)]


def _layer(index: int, layer: CacheSpec, tensors: Mapping[str, Tensor]) -> CacheCodec:
    def read(name: str, shape: tuple[int, ...], positive: bool = False) -> Tensor:
        return _checked(f"layers.{index}.{name}", shape, positive, tensors)

    codec: CacheCodec = FORMS[layer.form].codec.from_tensors(layer, read)
    return codec


def _checked(name: str, shape: tuple[int, ...], positive: bool, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise ValueError(f"codec tensor {name} is missing; the codec file does not belong to this config.json")
    tensor = tensors[name].float()
    if tuple(tensor.shape) != shape:
        raise ValueError(f"codec tensor {name} has shape {tuple(tensor.shape)}; config.json says {shape}")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"codec tensor {name} has values that are not finite; the codec file is damaged")
    if positive and not bool((tensor > 0).all()):
        raise ValueError(f"{name} has values that are not positive; the codec file is damaged")
    return tensor
