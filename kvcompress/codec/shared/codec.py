"""The codec of a layer that shares its latent with the other layers of its group.

    latent_t = sum over the group's layers l of (x_lt - mean_l) @ basis_l          x_lt ~ mean_l + latent_t @ inverse_l

x_lt is what layer l has at token t, all KV heads side by side: values, and keys before RoPE (layers share a subspace
of those; RoPE would turn it at every position). What is added up is any state of a layer: a latent that the model
itself caches would do as well. The sum is complete when the group's last layer has run, so while a step runs its own
tokens are used as they are, and all earlier ones as they are stored. So results depend on how a prompt is cut into
steps, as they do for every cache that quantizes what it has just attended.

The latent's channels are dealt to the layers in turn. What one layer stores, encoded like one head, is its stripe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcompress.codec import scalar
from kvcompress.codec.bands import SideSpec
from kvcompress.codec.contract import ReadTensor
from kvcompress.codec.heads.codec import SideCodec
from kvcompress.codec.record import Record
from kvcompress.codec.rope import Rope
from kvcompress.codec.shared.spec import SharedSpec


@dataclass(frozen=True)
class SharedSide:
    """One layer's part in a group's latent of keys or values, float32. R are the channels of the whole group.

    Channels come stripe by stripe. Scales are the same in all layers of the group, so that any of them can decode.
    """

    spec: SideSpec
    mean_HD: Tensor
    basis_HDR: Tensor
    inverse_HRD: Tensor
    scale_WR: Tensor
    """Standard deviation of each channel, by stripe `[layers of the group, channels of a stripe]`."""
    encode_HDR: Tensor = field(init=False, repr=False)
    """basis with the static scale divided out."""
    decode_HRD: Tensor = field(init=False, repr=False)
    """inverse with the static scale multiplied in."""
    weight_WR: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        heads, head_dim, rank = self.basis_HDR.shape
        assert self.mean_HD.shape == (heads, head_dim)
        assert self.inverse_HRD.shape == (heads, rank, head_dim)
        assert self.scale_WR.shape == (rank // self.spec.rank, self.spec.rank)
        scale_R = self.scale_WR.flatten()
        object.__setattr__(self, "encode_HDR", self.basis_HDR / scale_R)
        object.__setattr__(self, "decode_HRD", self.inverse_HRD * scale_R[:, None])
        object.__setattr__(self, "weight_WR", self.scale_WR.square())

    def part(self, x_THD: Tensor) -> Tensor:
        """What this layer adds to the group's normalized latent `[tokens, R]`."""
        return torch.einsum("thd,hdr->tr", x_THD.float() - self.mean_HD, self.encode_HDR)

    def encode(self, latent_TR: Tensor) -> Record:
        """The complete normalized latent, stripes in the place of heads."""
        return scalar.encode(latent_TR.unflatten(-1, self.scale_WR.shape), self.weight_WR, self.spec)

    def decode(self, encoded: Record) -> Tensor:
        """All stripes back to the normalized latent `[tokens, R]`."""
        return scalar.decode(encoded, self.spec).flatten(1)

    def expand(self, latent_TR: Tensor) -> Tensor:
        """The normalized latent to this layer's states `[tokens, heads, head_dim]`, float32."""
        return torch.einsum("tr,hrd->thd", latent_TR, self.decode_HRD) + self.mean_HD

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean_HD, "basis": self.basis_HDR, "inverse": self.inverse_HRD, "scale": self.scale_WR}

    def silent(self) -> Tensor:
        """Whether all latents stand for nothing in this layer, bool `[]`."""
        return ~self.inverse_HRD.any()

    def to(self, device: torch.device | str) -> SharedSide:
        """On a device, laid out as kernels read it."""
        return SharedSide(self.spec, *(tensor.to(device).contiguous() for tensor in self.tensors().values()))


@dataclass(frozen=True)
class SharedCodec:
    """One layer of a group. With share "v" keys have a codec of their own, per head and after RoPE."""

    spec: SharedSpec
    k: SharedSide | SideCodec
    v: SharedSide
    rope: Rope | None
    """The rotation of keys, where keys are shared."""

    def __post_init__(self) -> None:
        assert isinstance(self.k, SharedSide) == (self.rope is not None) == (self.spec.share == "kv")

    @property
    def shared_sides(self) -> dict[str, SharedSide]:
        """The sides whose latent is the group's, by name."""
        sides = {"k": self.k, "v": self.v}
        return {name: side for name, side in sides.items() if isinstance(side, SharedSide)}

    def states(self, side: str, x_THD: Tensor, positions_T: Tensor) -> Tensor:
        """Post-RoPE keys ("k") or values ("v") as the states that the group's latent is of."""
        return self.rope.unrotate(x_THD, positions_T) if side == "k" and self.rope else x_THD

    def read(self, side: str, latent_TR: Tensor, positions_T: Tensor) -> Tensor:
        """This layer's post-RoPE keys ("k") or values ("v") from the group's normalized latent, float32."""
        x_THD = self.shared_sides[side].expand(latent_TR)
        return self.rope.rotate(x_THD, positions_T) if side == "k" and self.rope else x_THD

    @staticmethod
    def round_trip(
        codecs: Sequence[SharedCodec], keys_THD: Sequence[Tensor], values_THD: Sequence[Tensor], positions_T: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        decoded: dict[str, Tensor] = {}
        for name, states in (("k", keys_THD), ("v", values_THD)):
            sides = [codec.shared_sides.get(name) for codec in codecs]
            parts = [
                side.part(codec.states(name, x_THD, positions_T))
                for codec, side, x_THD in zip(codecs, sides, states, strict=True)
                if side is not None
            ]
            if parts:
                assert sides[-1] is not None
                decoded[name] = sides[-1].decode(sides[-1].encode(torch.stack(parts).sum(0)))
        read = []
        for codec, keys in zip(codecs, keys_THD, strict=True):
            if isinstance(codec.k, SideCodec):
                k_THD = codec.k.reconstruct(codec.k.encode(keys))
            else:
                k_THD = codec.read("k", decoded["k"], positions_T)
            read.append((k_THD, codec.read("v", decoded["v"], positions_T)))
        return read

    def as_stored(self, side: str, query_Q1: Tensor, token_1T: Tensor, start: int) -> Tensor:
        """Of shared sides the tokens before the step, whose own latents are not complete; of keys of its own all."""
        return token_1T < start if side in self.shared_sides else torch.ones_like(token_1T, dtype=torch.bool)

    def silent(self) -> list[Tensor]:
        return [self.k.silent(), self.v.silent()]

    def tensors(self) -> dict[str, Tensor]:
        sides = {"k": self.k.tensors(), "v": self.v.tensors()}
        found = {f"{side}.{name}": tensor for side, tensors in sides.items() for name, tensor in tensors.items()}
        if self.rope is not None:
            found |= {"rope.frequency": self.rope.frequency_F, "rope.amplitude": self.rope.amplitude_1}
        return found

    @classmethod
    def from_tensors(cls, spec: SharedSpec, read: ReadTensor) -> SharedCodec:
        v = _read_shared("v", spec.v, spec, read)
        if spec.share == "v":
            return cls(spec, SideCodec.read("k", spec.k, spec, read), v, None)
        rope = Rope(
            read("rope.frequency", (spec.head_dim // 2,), positive=True), read("rope.amplitude", (1,), positive=True)
        )
        return cls(spec, _read_shared("k", spec.k, spec, read), v, rope)

    def to(self, device: torch.device | str) -> SharedCodec:
        rope = None if self.rope is None else self.rope.to(device)
        return SharedCodec(self.spec, self.k.to(device), self.v.to(device), rope)

    def heads(self, start: int, stop: int) -> SharedCodec:
        """All heads or none: the latent is of all of them.

        Raises:
            ValueError: only some of the heads are asked for.
        """
        if (start, stop) != (0, self.spec.num_kv_heads):
            raise ValueError(
                f"a latent that layers share is of all {self.spec.num_kv_heads} KV heads and cannot be divided among "
                "tensor-parallel ranks; serve it on one GPU per replica"
            )
        return self


def _read_shared(name: str, side: SideSpec, spec: SharedSpec, read: ReadTensor) -> SharedSide:
    heads, head_dim, layers = spec.num_kv_heads, spec.head_dim, len(spec.group)
    rank = layers * side.rank
    return SharedSide(
        side,
        read(f"{name}.mean", (heads, head_dim)),
        read(f"{name}.basis", (heads, head_dim, rank)),
        read(f"{name}.inverse", (heads, rank, head_dim)),
        read(f"{name}.scale", (layers, side.rank), positive=True),
    )
