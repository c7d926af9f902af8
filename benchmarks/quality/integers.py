"""Integer codes: min-max per group, as vLLM and KIVI store them, and llama.cpp's blocks of 32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TINY = 1e-8
BLOCK = 32
"""Values of a block of llama.cpp's."""


def group_size(channels: int, wanted: int) -> int:
    """Values of a row that share a scale: `wanted`, all where there are fewer, else what divides the row evenly."""
    return channels if channels <= wanted else math.gcd(channels, wanted)


def min_max(states: Tensor, bits: int, group: int) -> Tensor:
    """States `[..., D]` in `bits` per value, with scale and zero point in 16 bits each per `group` values of a row."""
    grouped = states.unflatten(-1, (-1, group))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(TINY).half().float().clamp_min(TINY)
    zero = low.half().float()
    codes = ((grouped - zero) / scale).round().clamp(0, 2**bits - 1)
    return (codes * scale + zero).flatten(-2)


def q4_0(states: Tensor) -> Tensor:
    """States `[..., D]` in llama.cpp's q4_0: blocks of 32, one 16-bit scale that puts the largest value on code -8."""
    grouped = states.unflatten(-1, (-1, group_size(states.shape[-1], BLOCK)))
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    codes = (grouped * inverse + 8.5).floor().clamp(0, 15) - 8
    return (codes * scale.half().float()).flatten(-2)


def q8_0(states: Tensor) -> Tensor:
    """States `[..., D]` in llama.cpp's q8_0: blocks of 32, one 16-bit scale that puts the largest value on code 127."""
    grouped = states.unflatten(-1, (-1, group_size(states.shape[-1], BLOCK)))
    scale = grouped.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    codes = (grouped * inverse).round()
    return (codes * scale.half().float()).flatten(-2)


def fp8_e4m3(states: Tensor) -> Tensor:
    """States in 8-bit floats with scale 1, what does not fit at the largest finite value."""
    limit = torch.finfo(torch.float8_e4m3fn).max
    return states.clamp(-limit, limit).to(torch.float8_e4m3fn).to(states.dtype)
