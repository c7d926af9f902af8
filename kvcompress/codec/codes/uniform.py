"""A symmetric mid-rise uniform quantizer: code c of b bits stands for (c - (2^b - 1) / 2) * step.

Its step, in units of the standard deviation, is the mean-square optimum for a Gaussian (J. Max, Quantizing for Minimum
Distortion, 1960).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcompress.codec.codes.code import Code

if TYPE_CHECKING:
    from torch import Tensor


class Uniform(Code):
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
