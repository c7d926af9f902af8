"""What kernels need of one layer's codec of form `shared`: shared keys' decoder as they read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvcompress.codec.bands import SideSpec
from kvcompress.codec.shared.codec import SharedCodec
from kvcompress.ops.interface.common import Side
from kvcompress.ops.shared import fragments
from kvcompress.ops.sides import merged_bands, record_struct


@dataclass(frozen=True)
class SharedPlan:
    """One layer of a group, ready for kernels. R are the channels of the group's whole latent."""

    codec: SharedCodec

    def __post_init__(self) -> None:
        object.__setattr__(self, "codec", self.codec.to(self.codec.k.mean_HD.device))

    @property
    def stripes(self) -> int:
        """Layers of the group."""
        return len(self.codec.spec.group)

    @cached_property
    def k_struct(self) -> Side:
        return record_struct(self.codec.k.spec)

    @cached_property
    def v_struct(self) -> Side:
        return record_struct(self.codec.v.spec)

    @cached_property
    def amplitude(self) -> float:
        return 1.0 if self.codec.rope is None else float(self.codec.rope.amplitude_1)

    @cached_property
    def k_decode_HDR(self) -> Tensor:
        """decode_HRD transposed, for keys of the layer's own: absorbing a query adds up its rows."""
        return self.codec.k.decode_HRD.mT.contiguous()

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
        if not self.codec.k.spec.has_gain:
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
        assert self.codec.rope is not None
        return by_position(self.codec.k.decode_HRD, self.codec.k.spec, _padded)

    @cached_property
    def k_fragments(self) -> fragments.SharedKeys:
        """Shared keys' decoder as the CUDA kernels read it."""
        rope = self.codec.rope
        assert rope is not None
        return fragments.shared_keys(
            by_position(self.codec.k.decode_HRD, self.codec.k.spec, fragments.padded),
            self.codec.k.mean_HD,
            rope.frequency_F,
            rope.amplitude_1,
        )

    @cached_property
    def k_absorb_HDP(self) -> Tensor:
        """What absorbs a query of keys of the layer's own, steps multiplied in, by position of the CUDA kernels."""
        return by_position(self.codec.k.decode_HRD, self.codec.k.spec, fragments.padded).mT.contiguous()

    @cached_property
    def _position_tops(self) -> Tensor:
        """The largest magnitude of 2c - (2^bits - 1) at every position."""
        tops = [torch.full((_padded(*band),), 2.0**band.bits - 1) for band in merged_bands(self.codec.k.spec)]
        return torch.cat(tops).repeat(self.stripes)


def by_position(decode_HRD: Tensor, spec: SideSpec, padded: Callable[[int, int], int]) -> Tensor:
    """A decoder with steps folded in; every band of a stripe has `padded(bits, width)` positions, zeros at its end."""
    stripes = decode_HRD.shape[1] // spec.rank
    decode_HWRD = decode_HRD.unflatten(1, (stripes, spec.rank))
    parts, start = [], 0
    for band in merged_bands(spec):
        part_HWRD = decode_HWRD[:, :, start : start + band.width] * band.code.step
        parts.append(torch.nn.functional.pad(part_HWRD, (0, 0, 0, padded(*band) - band.width)))
        start += band.width
    return torch.cat(parts, dim=2).flatten(1, 2).contiguous()


def _padded(bits: int, width: int) -> int:
    """Channels of a band's whole 32-bit words."""
    return -(-bits * width // 32) * 32 // bits
