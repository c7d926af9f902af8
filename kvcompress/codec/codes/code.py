"""What a code is: a way to store one channel in a fixed number of bits. No torch until numbers are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Processor = Literal["cpu", "cuda"]


class Code(Protocol):
    """Channels come divided by their static scale, and where the code has a gain, by that."""

    @property
    def bits(self) -> int:
        """Bits of a channel; a band names its code by them."""

    @property
    def has_gain(self) -> bool:
        """Whether the code is relative to a gain per token and head. Without one it stands alone in its side."""

    @property
    def reach(self) -> float:
        """Its outermost value: beyond, it clips."""

    @property
    def expected_error(self) -> float:
        """Mean squared error of a unit-variance Gaussian channel."""

    @property
    def step(self) -> float:
        """What kernels multiply by after unpacking: into a query or an output, once."""

    @property
    def kernels(self) -> tuple[Processor, ...]:
        """Processors whose kernels unpack it; elsewhere torch does."""

    def encode(self, unit: Tensor) -> Tensor:
        """float32 channels to code numbers, as `decode` and `pack` take them."""

    def decode(self, code: Tensor) -> Tensor:
        """Code numbers to the values they stand for, float32."""

    def pack(self, code: Tensor) -> Tensor:
        """Code numbers `[..., n]`, n a multiple of 8, to bytes: uint8 `[..., n * bits / 8]`."""

    def unpack(self, packed: Tensor) -> Tensor:
        """Inverse of `pack`, as `decode` takes them."""
