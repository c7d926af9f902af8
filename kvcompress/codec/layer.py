"""The codec of one attention layer: the tensors that turn keys and values into latents, and the two directions.

    latent = (x - mean) @ basis          x ~ mean + latent @ inverse          per KV head, keys after RoPE

For a plain orthogonal basis `inverse` is its transpose; a basis found in the metric that attention sees (S) stores
basis = S U and inverse = U^T S^-1. Channels are ordered by importance, most first. `scale` is the standard deviation
of each latent channel on the calibration data, the unit in which `scalar` quantizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcompress.codec import scalar
from kvcompress.codec.forms import ReadTensor
from kvcompress.codec.spec import LayerSpec, SideSpec


@dataclass(frozen=True)
class SideCodec:
    """Keys or values of one layer. All tensors are float32."""

    spec: SideSpec
    mean_HD: Tensor
    basis_HDR: Tensor
    inverse_HRD: Tensor
    scale_HR: Tensor
    encode_HDR: Tensor = field(init=False, repr=False)
    """basis with the static scale divided out: x to normalized latents."""
    decode_HRD: Tensor = field(init=False, repr=False)
    """inverse with the static scale multiplied in: normalized latents to x."""
    weight_HR: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        heads, head_dim, rank = self.basis_HDR.shape
        assert rank == self.spec.rank
        assert self.mean_HD.shape == (heads, head_dim)
        assert self.inverse_HRD.shape == (heads, rank, head_dim)
        assert self.scale_HR.shape == (heads, rank)
        object.__setattr__(self, "encode_HDR", self.basis_HDR / self.scale_HR[:, None, :])
        object.__setattr__(self, "decode_HRD", self.inverse_HRD * self.scale_HR[:, :, None])
        object.__setattr__(self, "weight_HR", self.scale_HR.square())

    def encode(self, x_THD: Tensor) -> scalar.Encoded:
        """Keys or values `[tokens, heads, head_dim]` as they are stored."""
        return scalar.encode(self._latent(x_THD), self.weight_HR, self.spec)

    def decode(self, encoded: scalar.Encoded) -> Tensor:
        """Stored tokens to normalized latents `[tokens, heads, rank]`, float32."""
        return scalar.decode(encoded, self.spec)

    def reconstruct(self, encoded: scalar.Encoded) -> Tensor:
        """Stored tokens back to keys or values `[tokens, heads, head_dim]`, float32."""
        return torch.einsum("thr,hrd->thd", self.decode(encoded), self.decode_HRD) + self.mean_HD

    def clips(self, x_THD: Tensor) -> Tensor:
        """Which keys or values are beyond their codes' reach (`scalar.clips`), bool `[tokens, heads]`."""
        return scalar.clips(self.encode(x_THD), self._latent(x_THD), self.weight_HR, self.spec)

    def _latent(self, x_THD: Tensor) -> Tensor:
        return torch.einsum("thd,hdr->thr", x_THD.float() - self.mean_HD, self.encode_HDR)

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean_HD, "basis": self.basis_HDR, "inverse": self.inverse_HRD, "scale": self.scale_HR}

    def to(self, device: torch.device | str) -> SideCodec:
        return SideCodec(
            self.spec,
            self.mean_HD.to(device),
            self.basis_HDR.to(device),
            self.inverse_HRD.to(device),
            self.scale_HR.to(device),
        )

    def heads(self, start: int, stop: int) -> SideCodec:
        """The codec of KV heads [start, stop): what one tensor-parallel rank needs."""
        return SideCodec(
            self.spec,
            self.mean_HD[start:stop],
            self.basis_HDR[start:stop],
            self.inverse_HRD[start:stop],
            self.scale_HR[start:stop],
        )

    def cut(self, spec: SideSpec) -> SideCodec:
        """The first channels only, as `spec` (made by `SideSpec.cut`) has them."""
        rank = spec.rank
        return SideCodec(
            spec,
            self.mean_HD,
            self.basis_HDR[..., :rank].contiguous(),
            self.inverse_HRD[:, :rank].contiguous(),
            self.scale_HR[:, :rank].contiguous(),
        )


@dataclass(frozen=True)
class LayerCodec:
    """Keys and values of one attention layer."""

    k: SideCodec
    v: SideCodec

    @property
    def spec(self) -> LayerSpec:
        heads, head_dim = self.k.mean_HD.shape
        return LayerSpec(heads, head_dim, self.k.spec, self.v.spec)

    def round_trip(self, keys_THD: Tensor, values_THD: Tensor) -> tuple[Tensor, Tensor]:
        """One sequence's keys and values as attention reads them back from the cache, float32."""
        return self.k.reconstruct(self.k.encode(keys_THD)), self.v.reconstruct(self.v.encode(values_THD))

    def tensors(self) -> dict[str, Tensor]:
        sides = {"k": self.k.tensors(), "v": self.v.tensors()}
        return {f"{side}.{name}": tensor for side, found in sides.items() for name, tensor in found.items()}

    @classmethod
    def from_tensors(cls, spec: LayerSpec, read: ReadTensor) -> LayerCodec:
        return cls(*(_read_side(name, side, spec, read) for name, side in (("k", spec.k), ("v", spec.v))))

    def to(self, device: torch.device | str) -> LayerCodec:
        return LayerCodec(self.k.to(device), self.v.to(device))

    def cut(self, spec: LayerSpec) -> LayerCodec:
        return LayerCodec(self.k.cut(spec.k), self.v.cut(spec.v))

    def heads(self, start: int, stop: int) -> LayerCodec:
        return LayerCodec(self.k.heads(start, stop), self.v.heads(start, stop))


def _read_side(name: str, side: SideSpec, layer: LayerSpec, read: ReadTensor) -> SideCodec:
    heads, head_dim, rank = layer.num_kv_heads, layer.head_dim, side.rank
    return SideCodec(
        side,
        read(f"{name}.mean", (heads, head_dim)),
        read(f"{name}.basis", (heads, head_dim, rank)),
        read(f"{name}.inverse", (heads, rank, head_dim)),
        read(f"{name}.scale", (heads, rank), positive=True),
    )
