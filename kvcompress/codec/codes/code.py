"""What a code is: a way to store a channel in a fixed number of bits. No torch until a channel is stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

Processor = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Code(ABC):
    """Channels come to it divided by their static scale and, where the code has a gain, by that."""

    bits: int
    """Of a channel; a band names its code by them."""
    step: float
    """What kernels multiply by after unpacking: into a query or an output, once."""
    expected_error: float
    """Mean squared error of a unit-variance Gaussian channel."""
    kernels: tuple[Processor, ...] = ()
    """Processors whose kernels unpack it; elsewhere torch does."""
    has_gain: ClassVar[bool] = True
    """Whether it is relative to a gain per token and head. A code without one stands alone in its side."""

    @property
    @abstractmethod
    def reach(self) -> float:
        """Its outermost value: beyond, it clips."""

    @abstractmethod
    def encode(self, unit: Tensor) -> Tensor:
        """float32 channels to code numbers, as `decode` and `pack` take them."""

    @abstractmethod
    def decode(self, code: Tensor) -> Tensor:
        """Code numbers to the values they stand for, float32."""

    def pack(self, code: Tensor) -> Tensor:
        """Code numbers `[..., n]`, n a multiple of 8, to bytes: uint8 `[..., n * bits / 8]`."""
        from kvcompress.codec.codes import packing

        return packing.pack(code, self.bits)

    def unpack(self, packed: Tensor) -> Tensor:
        """Inverse of `pack`."""
        from kvcompress.codec.codes import packing

        return packing.unpack(packed, self.bits)
