"""What a codec is to everybody else, whatever form its layer's cache has (`kvcompress.forms`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from kvcompress.codec.spec import CacheSpec


class ReadTensor(Protocol):
    """Fetches one tensor of a layer, in float32, and checks it."""

    def __call__(self, name: str, shape: tuple[int, ...], positive: bool = False) -> Tensor:
        """Raises ValueError: missing, another shape, not finite, or not positive where asked."""


class CacheCodec(Protocol):
    """One layer's codec in any form."""

    @property
    def spec(self) -> CacheSpec:
        """Its plain data."""

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, by the names that `from_tensors` asks for."""

    @classmethod
    def from_tensors(cls, spec: Any, read: ReadTensor) -> Self:
        """Inverse of `tensors`."""

    def to(self, device: torch.device | str) -> CacheCodec:
        """The same codec on a device."""

    def heads(self, start: int, stop: int) -> CacheCodec:
        """What one tensor-parallel rank needs: the codec of KV heads [start, stop)."""

    @staticmethod
    def round_trip(
        codecs: Sequence[Any], keys_THD: Sequence[Tensor], values_THD: Sequence[Tensor], positions_T: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """One sequence's keys and values as attention reads them back, all tokens from the cache, float32.

        Args:
            codecs: one layer's, or of a form with groups all of a group's in its order; keys (after RoPE) and values
                likewise.
        """

    def as_stored(self, side: str, query_Q1: Tensor, token_1T: Tensor, start: int) -> Tensor:
        """Which tokens a step's queries see in their stored form, of keys ("k") or values ("v").

        Args:
            query_Q1, token_1T: positions of queries and of tokens up to the last of them.
            start: position of the step's first query.

        Returns:
            bool, to be broadcast to `[queries, tokens]`; the others are seen as they are.
        """

    def silent(self) -> list[Tensor]:
        """Of every side: whether all of its latents stand for nothing, bool `[]`, as in a layer switched off."""
