"""A model's codec in codec.safetensors, whatever form each layer's cache has (`spec.FORMS`)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from kvcompress.codec.spec import FORMS, CacheSpec, CodecSpec


class ReadTensor(Protocol):
    """Fetches one tensor of a layer, in float32, and checks it."""

    def __call__(self, name: str, shape: tuple[int, ...], positive: bool = False) -> Tensor:
        """Raises ValueError: missing, another shape, not finite, or not positive where asked."""


class CacheCodec(Protocol):
    """One layer's codec in any form."""

    @property
    def spec(self) -> CacheSpec:
        """Its plain data."""

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, by the names that `from_tensors` asks for."""

    @classmethod
    def from_tensors(cls, spec: Any, read: ReadTensor) -> Self:
        """Inverse of `tensors`."""

    def to(self, device: torch.device | str) -> CacheCodec:
        """The same codec on a device."""

    def heads(self, start: int, stop: int) -> CacheCodec:
        """What one tensor-parallel rank needs: the codec of KV heads [start, stop)."""


@runtime_checkable
class LayerwiseCodec(CacheCodec, Protocol):
    """A codec that reads a layer's cache from that layer's cache alone."""

    def round_trip(self, keys_THD: Tensor, values_THD: Tensor) -> tuple[Tensor, Tensor]:
        """One sequence's keys and values as attention reads them back from the cache, float32."""


@runtime_checkable
class GroupCodec(CacheCodec, Protocol):
    """A codec that reads a layer's cache from the caches of a group of layers."""

    @property
    def group(self) -> tuple[int, ...]:
        """The group's layers, in order."""

    @staticmethod
    def round_trip_group(
        codecs: Sequence[Any], keys_THD: Sequence[Tensor], values_THD: Sequence[Tensor], positions_T: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """`LayerwiseCodec.round_trip` of every layer of a group: codecs, post-RoPE keys and values in its order."""


def round_trip(
    codecs: Sequence[CacheCodec], keys_THD: Sequence[Tensor], values_THD: Sequence[Tensor], positions_T: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """One sequence's keys and values as attention reads them back, all tokens from the cache, float32.

    Args:
        codecs: one layer's, or all of a group's in its order; keys (after RoPE) and values likewise.
    """
    leader = codecs[0]
    if isinstance(leader, GroupCodec):
        return leader.round_trip_group(codecs, keys_THD, values_THD, positions_T)
    assert isinstance(leader, LayerwiseCodec)
    assert len(codecs) == 1
    return [leader.round_trip(keys_THD[0], values_THD[0])]


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

    _, _, module, name = FORMS[layer.form]
    codec: CacheCodec = getattr(importlib.import_module(module), name).from_tensors(layer, read)
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
