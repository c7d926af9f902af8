"""The codec of one attention layer: the tensors that turn keys and values into latents, and the two directions.

    latent = (x - mean) @ basis          x ~ mean + latent @ inverse          per KV head, keys after RoPE

For a plain orthogonal basis `inverse` is its transpose; a basis found in the metric that attention sees (S) stores
basis = S U and inverse = U^T S^-1. Channels are ordered by importance, most first. `scale` is the standard deviation
of each latent channel on the calibration data, the unit in which `scalar` quantizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcompress.codec import scalar
from kvcompress.codec.bands import SideSpec
from kvcompress.codec.contract import ReadTensor
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.codec.record import Record
from kvcompress.codec.side import Side, Sides


@dataclass(frozen=True)
class SideCodec(Side[SideSpec]):
    """Keys or values of one layer, every token's record by itself. All tensors are float32."""

    weight_HR: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weight_HR", self.scale_HR.square())

    def encode(self, x_THD: Tensor) -> Record:
        """Keys or values `[tokens, heads, head_dim]` as they are stored."""
        return scalar.encode(self.latent(x_THD), self.weight_HR, self.spec)

    def decode(self, encoded: Record) -> Tensor:
        """Stored tokens to normalized latents `[tokens, heads, rank]`, float32."""
        return scalar.decode(encoded, self.spec)

    def reconstruct(self, encoded: Record) -> Tensor:
        """Stored tokens back to keys or values `[tokens, heads, head_dim]`, float32."""
        return torch.einsum("thr,hrd->thd", self.decode(encoded), self.decode_HRD) + self.mean_HD

    def clips(self, x_THD: Tensor) -> Tensor:
        """Which keys or values are beyond their codes' reach (`scalar.clips`), bool `[tokens, heads]`."""
        return scalar.clips(self.encode(x_THD), self.latent(x_THD), self.weight_HR, self.spec)

    def latent(self, x_THD: Tensor) -> Tensor:
        """Keys or values to normalized latents `[tokens, heads, rank]`, float32."""
        return torch.einsum("thd,hdr->thr", x_THD.float() - self.mean_HD, self.encode_HDR)

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


class HeadsCodec(Sides[SideCodec]):
    """Keys and values of one attention layer."""

    @property
    def spec(self) -> HeadsSpec:
        heads, head_dim = self.k.mean_HD.shape
        return HeadsSpec(heads, head_dim, self.k.spec, self.v.spec)

    @staticmethod
    def round_trip(
        codecs: Sequence[HeadsCodec], keys_THD: Sequence[Tensor], values_THD: Sequence[Tensor], positions_T: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        return [
            (codec.k.reconstruct(codec.k.encode(keys)), codec.v.reconstruct(codec.v.encode(values)))
            for codec, keys, values in zip(codecs, keys_THD, values_THD, strict=True)
        ]

    def as_stored(self, side: str, query_Q1: Tensor, token_1T: Tensor, start: int) -> Tensor:
        """All tokens, a step's own included."""
        return torch.ones_like(token_1T, dtype=torch.bool)

    def clips(self, keys_THD: Tensor, values_THD: Tensor) -> dict[str, Tensor]:
        """By side, which tokens and heads lie beyond their codes' reach (`scalar.clips`), bool `[tokens, heads]`."""
        return {"k": self.k.clips(keys_THD), "v": self.v.clips(values_THD)}

    @classmethod
    def from_tensors(cls, spec: HeadsSpec, read: ReadTensor) -> HeadsCodec:
        return cls(SideCodec.read("k", spec.k, spec, read), SideCodec.read("v", spec.v, spec, read))

    def cut(self, spec: HeadsSpec) -> HeadsCodec:
        return HeadsCodec(self.k.cut(spec.k), self.v.cut(spec.v))
