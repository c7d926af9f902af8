"""Keys that layers share, as the CUDA kernels expand them from latents (csrc/cuda/shared/scores.h).

A head's keys are products of the latent's tiles, 16 tokens x 16 channels, with tiles of the decoder, 16 channels x 8
columns. The latter are stored as halves in the order in which the tensor core's lanes hold them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 16
"""Channels of a latent's tile."""

WIDTHS = (64, 128, 256)
"""Columns that the kernels expand; head_dim and zeros."""

_LARGEST = 8
"""The decoder's largest entry of a head lies between half of 2 to this and it."""


@dataclass(frozen=True)
class SharedKeys:
    """A decoder with steps folded in, and what turns its products into keys."""

    decode: Tensor
    """float16 `[heads, tiles, width / 16, lanes, 8]`."""
    unit_H: Tensor
    """What products are to be multiplied by, float32."""
    mean_HW: Tensor
    frequency_F: Tensor
    """Radians per token `[width / 2]`."""
    amplitude_1: Tensor

    @property
    def width(self) -> int:
        return self.mean_HW.shape[1]


def covers(head_dim: int) -> bool:
    """Whether the kernels know keys of so many channels."""
    return head_dim % 2 == 0 and head_dim <= WIDTHS[-1]


def padded(bits: int, width: int) -> int:
    """Positions of a band: whole tiles."""
    return -(-width // TILE) * TILE


def shared_keys(decode_HPD: Tensor, mean_HD: Tensor, frequency_F: Tensor, amplitude_1: Tensor) -> SharedKeys:
    """Prepare a decoder by position; nothing is read from the device.

    Args:
        decode_HPD: float32, positions in whole tiles.
    """
    width = next(width for width in WIDTHS if width >= decode_HPD.shape[2])
    heads = decode_HPD.shape[0]
    exponent_H = torch.frexp(decode_HPD.abs().amax((1, 2))).exponent
    scaled_HPD = torch.ldexp(decode_HPD, (_LARGEST - exponent_H)[:, None, None])
    # Lane 4 g + t holds channels 4 t + 2 i + e of a tile and column g of two neighbouring tiles of eight columns.
    tiles = _widened(scaled_HPD, width).half().view(heads, -1, 4, 2, 2, width // 16, 2, 8)
    decode = tiles.permute(0, 1, 5, 7, 2, 6, 3, 4).reshape(heads, -1, width // 16, 32, 8)
    frequency_F = torch.nn.functional.pad(frequency_F, (0, width // 2 - frequency_F.shape[0]))
    return SharedKeys(
        decode.contiguous(),
        torch.ldexp(torch.ones_like(exponent_H, dtype=torch.float32), exponent_H - _LARGEST),
        _widened(mean_HD, width).contiguous(),
        frequency_F.float().contiguous(),
        amplitude_1.float(),
    )


def _widened(x: Tensor, width: int) -> Tensor:
    """Channels in two halves, each padded to its end: the two channels of a rotation stay half a width apart."""
    halves = x.unflatten(-1, (2, -1))
    return torch.nn.functional.pad(halves, (0, width // 2 - halves.shape[-1])).flatten(-2)
