"""The codec of form `halves`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.codec.contract import ReadTensor
from tests.toy_form.codec.halves.spec import HalvesSpec


@dataclass(frozen=True)
class HalvesCodec:
    """`unit_1` is what numbers are stored in: something to be found in the codec file."""

    spec: HalvesSpec
    unit_1: Tensor

    def encode(self, x_THD: Tensor) -> Tensor:
        return (x_THD.float() / self.unit_1).half()

    def decode(self, stored_THD: Tensor) -> Tensor:
        return stored_THD.float() * self.unit_1

    @staticmethod
    def round_trip(
        codecs: Sequence[HalvesCodec], keys_THD: Sequence[Tensor], values_THD: Sequence[Tensor], positions_T: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        layers = zip(codecs, keys_THD, values_THD, strict=True)
        return [(codec.decode(codec.encode(k)), codec.decode(codec.encode(v))) for codec, k, v in layers]

    def as_stored(self, side: str, query_Q1: Tensor, token_1T: Tensor, start: int) -> Tensor:
        return torch.ones_like(token_1T, dtype=torch.bool)

    def silent(self) -> list[Tensor]:
        return [torch.zeros((), dtype=torch.bool)] * 2

    def tensors(self) -> dict[str, Tensor]:
        return {"unit": self.unit_1}

    @classmethod
    def from_tensors(cls, spec: HalvesSpec, read: ReadTensor) -> HalvesCodec:
        return cls(spec, read("unit", (1,), positive=True))

    def to(self, device: torch.device | str) -> HalvesCodec:
        return HalvesCodec(self.spec, self.unit_1.to(device))

    def heads(self, start: int, stop: int) -> HalvesCodec:
        return HalvesCodec(HalvesSpec(stop - start, self.spec.head_dim), self.unit_1)
