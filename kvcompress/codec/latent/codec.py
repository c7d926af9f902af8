"""The codec of a layer whose cache holds what the model computes: none. It says so in a codec's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.codec.contract import ReadTensor
from kvcompress.codec.latent.spec import LatentSpec


@dataclass(frozen=True)
class LatentCodec:
    """One layer; every tensor-parallel rank has all of it."""

    spec: LatentSpec

    @staticmethod
    def round_trip(
        codecs: Sequence[LatentCodec], keys_THD: Sequence[Tensor], values_THD: Sequence[Tensor], positions_T: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        return [(keys.float(), values.float()) for keys, values in zip(keys_THD, values_THD, strict=True)]

    def as_stored(self, side: str, query_Q1: Tensor, token_1T: Tensor, start: int) -> Tensor:
        return torch.ones_like(token_1T, dtype=torch.bool)

    def silent(self) -> list[Tensor]:
        return [torch.zeros((), dtype=torch.bool)]

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def from_tensors(cls, spec: LatentSpec, read: ReadTensor) -> LatentCodec:
        return cls(spec)

    def to(self, device: torch.device | str) -> LatentCodec:
        return self

    def heads(self, start: int, stop: int) -> LatentCodec:
        return self
