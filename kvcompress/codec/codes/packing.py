"""Codes of up to 8 bits in bytes: channel c of b bits begins in byte c*b//8 at bit c*b%8, lowest bits first."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pack(code: Tensor, bits: int) -> Tensor:
    """Whole numbers below `2**bits`, `[..., n]`, to uint8 `[..., n * bits / 8]`."""
    shifts, places = _word(bits, code.device)
    # The codes of one word occupy different bits, so their sum is their union.
    word = (code.to(shifts.dtype).unflatten(-1, (-1, len(shifts))) << shifts).sum(-1, dtype=shifts.dtype)
    packed: Tensor = word if len(places) == 1 else (word[..., None] >> places & 0xFF).to(torch.uint8).flatten(-2)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: uint8."""
    shifts, places = _word(bits, packed.device)
    word = packed
    if len(places) > 1:
        word = (packed.to(shifts.dtype).unflatten(-1, (-1, len(places))) << places).sum(-1)
    code: Tensor = word[..., None] >> shifts & (2**bits - 1)
    return code.to(torch.uint8).flatten(-2)


def _word(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The least number of codes that fill whole bytes: where in their bits each code begins, and each byte."""
    size = math.lcm(bits, 8)
    dtype = torch.uint8 if size == 8 else torch.int64
    codes, places = (torch.arange(0, size, width, device=device, dtype=dtype) for width in (bits, 8))
    return codes, places
