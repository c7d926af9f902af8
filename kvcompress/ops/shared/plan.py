"""What attention needs of one layer's shared codec: contiguous float32 tensors, and shared keys' decoder as kernels
read it.

A codec (`codec.shared.SharedCodec`) is seen through protocols here, because this package lies below the codec's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from kvcompress.codec.bands import SideSpec
from kvcompress.ops import interface
from kvcompress.ops.shared import fragments as cuda_keys
from kvcompress.ops.sides import merged_bands, record_struct, spec_numbers, spec_of, step


class DecodedSide(Protocol):
    """Keys or values of one layer, as `codec.shared.SharedSide` and `codec.layer.SideCodec` have them."""

    @property
    def spec(self) -> SideSpec: ...
    @property
    def mean_HD(self) -> Tensor: ...
    @property
    def decode_HRD(self) -> Tensor: ...


class Rotation(Protocol):
    @property
    def frequency_F(self) -> Tensor: ...
    @property
    def amplitude_1(self) -> Tensor: ...


class SharedTensors(Protocol):
    """One layer of a group, as `codec.shared.SharedCodec` has it."""

    @property
    def k(self) -> DecodedSide: ...
    @property
    def v(self) -> DecodedSide: ...
    @property
    def rope(self) -> Rotation | None: ...


@dataclass(frozen=True)
class SharedPlan:
    """One layer of a group, ready for `ops.shared.attend`. R are the channels of the group's whole latent."""

    k_spec: SideSpec
    v_spec: SideSpec
    """The bands of one stripe, or of one head's keys where the layer has keys of its own."""
    k_mean_HD: Tensor
    k_decode_HRD: Tensor
    v_mean_HD: Tensor
    v_decode_HRD: Tensor
    frequency_F: Tensor | None
    """The rotation of shared keys; None: the layer has keys of its own, after RoPE."""
    amplitude_1: Tensor | None

    @classmethod
    def of(cls, codec: SharedTensors) -> SharedPlan:
        tensors = (codec.k.mean_HD, codec.k.decode_HRD, codec.v.mean_HD, codec.v.decode_HRD)
        rotation = (None, None) if codec.rope is None else (codec.rope.frequency_F, codec.rope.amplitude_1)
        plan = cls(codec.k.spec, codec.v.spec, *(tensor.float().contiguous() for tensor in tensors), *rotation)
        if plan.k_mean_HD.device.type == "cuda" and cuda_keys.covers(plan.k_mean_HD.shape[1]):
            # Now, because the first call may be one that a CUDA graph captures.
            _ = plan.k_absorb_HDP if plan.frequency_F is None else plan.k_fragments
        return plan

    @property
    def stripes(self) -> int:
        """Layers of the group."""
        return self.v_decode_HRD.shape[1] // self.v_spec.rank

    def covered(self) -> bool:
        """Whether the compiled kernels know this layer's shape."""
        head_dim, ranks = self.k_mean_HD.shape[1], (self.k_decode_HRD.shape[1], self.v_decode_HRD.shape[1])
        return (
            head_dim <= interface.MAX_HEAD_DIM
            and head_dim % 8 == 0
            and max(ranks) <= interface.MAX_LATENT_CHANNELS
            and not self.k_spec.outliers
            and not self.v_spec.outliers
        )

    @cached_property
    def k_struct(self) -> interface.Side:
        return record_struct(self.k_spec)

    @cached_property
    def v_struct(self) -> interface.Side:
        return record_struct(self.v_spec)

    @cached_property
    def amplitude(self) -> float:
        return 1.0 if self.amplitude_1 is None else float(self.amplitude_1)

    @cached_property
    def k_decode_HDR(self) -> Tensor:
        """decode_HRD transposed, for keys of the layer's own: absorbing a query adds up its rows."""
        return self.k_decode_HRD.mT.contiguous()

    @cached_property
    def k_decode_blocked(self) -> Tensor:
        """Shared keys' decoder with steps folded in: `[heads, head_dim / 8, positions, 8]`, positions stripe by stripe
        as the kernels unpack codes."""
        heads, positions, head_dim = self._k_decode_HPD.shape
        return self._k_decode_HPD.view(heads, positions, head_dim // 8, 8).transpose(1, 2).contiguous()

    @cached_property
    def k_codes_blocked(self) -> tuple[Tensor, Tensor] | None:
        """The same as 16-bit integers for products with codes, and the scale `[heads, head_dim]` of their sums.

        int16 `[heads, head_dim / 8, positions / 2, 8, 2]`; a code c stands for the odd number 2c - (2^bits - 1). The
        scale leaves no room for a stripe's sum to exceed 32 bits. None where channels are floats.
        """
        if not self.k_spec.has_gain:
            return None
        half_HPD = self._k_decode_HPD / 2
        largest_P = self._position_tops.to(half_HPD.device)
        reach_HWPD = (half_HPD.abs() * largest_P[:, None]).unflatten(1, (self.stripes, -1))
        scale_HD = torch.maximum(half_HPD.abs().amax(1) / 32767, reach_HWPD.sum(2).amax(1) / (2**31 - 2**24))
        scale_HD = scale_HD.clamp_min(1e-30)
        codes_HPD = (half_HPD / scale_HD[:, None]).round().to(torch.int16)
        heads, positions, head_dim = codes_HPD.shape
        codes = codes_HPD.view(heads, positions // 2, 2, head_dim // 8, 8).permute(0, 3, 1, 4, 2)
        return codes.contiguous(), scale_HD.contiguous()

    @cached_property
    def _k_decode_HPD(self) -> Tensor:
        """decode_HRD by position; positions that pad a band to whole words have zeros."""
        assert self.frequency_F is not None
        return by_position(self.k_decode_HRD, self.k_spec, _padded)

    @cached_property
    def k_fragments(self) -> cuda_keys.SharedKeys:
        """Shared keys' decoder as the CUDA kernels read it."""
        assert self.frequency_F is not None
        assert self.amplitude_1 is not None
        return cuda_keys.shared_keys(
            by_position(self.k_decode_HRD, self.k_spec, cuda_keys.padded),
            self.k_mean_HD,
            self.frequency_F,
            self.amplitude_1,
        )

    @cached_property
    def k_absorb_HDP(self) -> Tensor:
        """What absorbs a query of keys of the layer's own, steps multiplied in, by position of the CUDA kernels."""
        return by_position(self.k_decode_HRD, self.k_spec, cuda_keys.padded).mT.contiguous()

    @cached_property
    def _position_tops(self) -> Tensor:
        """The largest magnitude of 2c - (2^bits - 1) at every position."""
        tops = [torch.full((_padded(*band),), 2.0**band.bits - 1) for band in merged_bands(self.k_spec)]
        return torch.cat(tops).repeat(self.stripes)

    def flatten(self) -> tuple[list[Tensor], list[int]]:
        """Tensors and numbers for a torch op, which takes no objects."""
        tensors = [self.k_mean_HD, self.k_decode_HRD, self.v_mean_HD, self.v_decode_HRD]
        if self.frequency_F is not None and self.amplitude_1 is not None:
            tensors += [self.frequency_F, self.amplitude_1]
        return tensors, [*spec_numbers(self.k_spec), *spec_numbers(self.v_spec)]

    @classmethod
    def unflatten(cls, tensors: Sequence[Tensor], numbers: Sequence[int]) -> SharedPlan:
        """Inverse of `flatten`."""
        split = 2 + 2 * numbers[1]
        rotation = tensors[4:] or (None, None)
        return cls(spec_of(numbers[:split]), spec_of(numbers[split:]), *tensors[:4], *rotation)


def by_position(decode_HRD: Tensor, spec: SideSpec, padded: Callable[[int, int], int]) -> Tensor:
    """A decoder with steps folded in; every band of a stripe has `padded(bits, width)` positions, zeros at its end."""
    stripes = decode_HRD.shape[1] // spec.rank
    decode_HWRD = decode_HRD.unflatten(1, (stripes, spec.rank))
    parts, start = [], 0
    for bits, width in merged_bands(spec):
        part_HWRD = decode_HWRD[:, :, start : start + width] * step(bits)
        parts.append(torch.nn.functional.pad(part_HWRD, (0, 0, 0, padded(bits, width) - width)))
        start += width
    return torch.cat(parts, dim=2).flatten(1, 2).contiguous()


def _padded(bits: int, width: int) -> int:
    """Channels of a band's whole 32-bit words."""
    return -(-bits * width // 32) * 32 // bits
