"""Channels as IEEE floats, little-endian: numbers, not codes, so they need no gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompress.codec.codes.code import Processor

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Float:
    """Of 16 or 32 bits; what lies beyond a half's range is stored as its end."""

    bits: int
    reach: float
    kernels: tuple[Processor, ...]
    has_gain: ClassVar[bool] = False
    expected_error: ClassVar[float] = 0.0
    step: ClassVar[float] = 1.0

    def encode(self, unit: Tensor) -> Tensor:
        return unit.clamp(-self.reach, self.reach).to(self._dtype)

    def decode(self, code: Tensor) -> Tensor:
        return code.float()

    def pack(self, code: Tensor) -> Tensor:
        import torch

        return code.contiguous().view(torch.uint8)

    def unpack(self, packed: Tensor) -> Tensor:
        return packed.contiguous().view(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        import torch

        return torch.float16 if self.bits == 16 else torch.float32
