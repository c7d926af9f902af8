"""Channels as IEEE floats of 16 or 32 bits, little-endian: numbers, not codes, so they need no gain."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from kvcompress.codec.codes.code import Code

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Float(Code):
    has_gain: ClassVar[bool] = False

    @property
    def reach(self) -> float:
        import torch

        return torch.finfo(self._dtype).max

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
