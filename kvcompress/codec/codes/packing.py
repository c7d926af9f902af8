"""Codes of 8, 4 or 2 bits in bytes, the first code in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(code: Tensor, bits: int) -> Tensor:
    """Whole numbers below `2**bits`, `[..., n]`, to uint8 `[..., n * bits / 8]`."""
    shifts = torch.arange(8 // bits, device=code.device, dtype=torch.uint8) * bits
    # The codes of one byte occupy different bits, so their sum is their union.
    packed: Tensor = (code.to(torch.uint8).unflatten(-1, (-1, 8 // bits)) << shifts).sum(-1, dtype=torch.uint8)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: uint8."""
    shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.uint8) * bits
    code: Tensor = (packed[..., None] >> shifts) & (2**bits - 1)
    return code.flatten(-2)
