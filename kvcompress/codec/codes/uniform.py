"""A symmetric mid-rise uniform quantizer: code c of b bits stands for (c - (2^b - 1) / 2) * step.

Its step, in units of the standard deviation, is the mean-square optimum for a Gaussian (J. Max, Quantizing for Minimum
Distortion, 1960).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompress.codec.codes.code import Processor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Uniform:
    bits: int
    step: float
    expected_error: float
    kernels: tuple[Processor, ...] = ()
    has_gain: ClassVar[bool] = True

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def reach(self) -> float:
        return self.top / 2 * self.step

    def encode(self, unit: Tensor) -> Tensor:
        return (unit / self.step + self.top / 2).round().clamp_(0, self.top)

    def decode(self, code: Tensor) -> Tensor:
        value: Tensor = (code.float() - self.top / 2) * self.step
        return value

    def pack(self, code: Tensor) -> Tensor:
        from kvcompress.codec.codes import packing

        return packing.pack(code, self.bits)

    def unpack(self, packed: Tensor) -> Tensor:
        from kvcompress.codec.codes import packing

        return packing.unpack(packed, self.bits)
