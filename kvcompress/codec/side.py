"""Keys or values of one layer in bases of their own, one per KV head: what encodings of their latents have in common.

latent = (x - mean) @ basis          x ~ mean + latent @ inverse
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from kvcompress.codec.contract import ReadTensor
from kvcompress.codec.spec import CacheSpec


class Ranked(Protocol):
    """The plain data of a side."""

    @property
    def rank(self) -> int:
        """Latent channels per head."""


SpecT = TypeVar("SpecT", bound=Ranked)


@dataclass(frozen=True)
class Side(Generic[SpecT]):
    """Keys or values of one layer. All tensors are float32."""

    spec: SpecT
    mean_HD: Tensor
    basis_HDR: Tensor
    inverse_HRD: Tensor
    scale_HR: Tensor
    encode_HDR: Tensor = field(init=False, repr=False)
    """basis with the static scale divided out: x to normalized latents."""
    decode_HRD: Tensor = field(init=False, repr=False)
    """inverse with the static scale multiplied in: normalized latents to x."""

    def __post_init__(self) -> None:
        heads, head_dim, rank = self.basis_HDR.shape
        assert rank == self.spec.rank
        assert self.mean_HD.shape == (heads, head_dim)
        assert self.inverse_HRD.shape == (heads, rank, head_dim)
        assert self.scale_HR.shape == (heads, rank)
        object.__setattr__(self, "encode_HDR", self.basis_HDR / self.scale_HR[:, None, :])
        object.__setattr__(self, "decode_HRD", self.inverse_HRD * self.scale_HR[:, :, None])

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean_HD, "basis": self.basis_HDR, "inverse": self.inverse_HRD, "scale": self.scale_HR}

    @classmethod
    def read(cls, name: str, spec: SpecT, layer: CacheSpec, read: ReadTensor) -> Self:
        """Inverse of `tensors`, whose names begin with `name`; `layer` says how many heads there are."""
        heads, head_dim, rank = layer.num_kv_heads, layer.head_dim, spec.rank
        return cls(
            spec,
            read(f"{name}.mean", (heads, head_dim)),
            read(f"{name}.basis", (heads, head_dim, rank)),
            read(f"{name}.inverse", (heads, rank, head_dim)),
            read(f"{name}.scale", (heads, rank), positive=True),
        )

    def to(self, device: torch.device | str) -> Self:
        """On a device, laid out as kernels read it."""
        return self._map(lambda tensor: tensor.to(device).contiguous())

    def heads(self, start: int, stop: int) -> Self:
        """The codec of KV heads [start, stop): what one tensor-parallel rank needs."""
        return self._map(lambda tensor: tensor[start:stop])

    def silent(self) -> Tensor:
        """Whether all latents stand for nothing, bool `[]`."""
        return ~self.inverse_HRD.any()

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(self.spec, *(change(tensor) for tensor in self.tensors().values()))


SideT = TypeVar("SideT", bound=Side)  # type: ignore[type-arg]


@dataclass(frozen=True)
class Sides(Generic[SideT]):
    """Keys and values of one attention layer, each a `Side`."""

    k: SideT
    v: SideT

    def tensors(self) -> dict[str, Tensor]:
        sides = {"k": self.k.tensors(), "v": self.v.tensors()}
        return {f"{side}.{name}": tensor for side, found in sides.items() for name, tensor in found.items()}

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.k.to(device), self.v.to(device))

    def heads(self, start: int, stop: int) -> Self:
        return type(self)(self.k.heads(start, stop), self.v.heads(start, stop))

    def silent(self) -> list[Tensor]:
        return [self.k.silent(), self.v.silent()]
