"""The states of one layer on the calibration tokens themselves, for methods that need more than moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.codec.rope import Rope

MAX_TOKENS = 16384
"""Tokens kept per layer, spread over all samples: what bounds the disk space and the memory of a fit."""


@dataclass(frozen=True)
class LayerStates:
    """Values, and keys before RoPE if asked for, `[tokens, heads, head_dim]`, float32; every layer's same tokens."""

    values_THD: Tensor
    index_T: Tensor
    """Each token's place in its sample, from 0."""
    keys_THD: Tensor | None = None

    def after(self, skip: int) -> LayerStates:
        """Without the first `skip` tokens of every sample."""
        kept = self.index_T >= skip
        keys_THD = None if self.keys_THD is None else self.keys_THD[kept]
        return LayerStates(self.values_THD[kept], self.index_T[kept], keys_THD)

    def tensors(self) -> dict[str, Tensor]:
        keys = {} if self.keys_THD is None else {"keys": self.keys_THD}
        return {"values": self.values_THD, "index": self.index_T, **keys}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LayerStates:
        """Inverse of `tensors`."""
        return cls(tensors["values"], tensors["index"], tensors.get("keys"))


class StatesCollector:
    """Keeps an even selection of one layer's states.

    Args:
        total: calibration tokens that will be shown.
        rope: the rotation of keys; None keeps no keys.
    """

    def __init__(self, total: int, rope: Rope | None) -> None:
        self.stride = -(-total // MAX_TOKENS)
        self.rope = rope
        self.seen = 0
        self.parts: list[dict[str, Tensor]] = []

    def add(self, key_BHTD: Tensor, value_BHTD: Tensor, offset: int) -> None:
        """One sample `[1, heads, tokens, head_dim]`, keys after RoPE, first token at position `offset`."""
        tokens = key_BHTD.shape[2]
        index_T = torch.arange(-self.seen % self.stride, tokens, self.stride)
        self.seen += tokens
        values_THD = value_BHTD[0].transpose(0, 1)[index_T.to(value_BHTD.device)]
        part = {"values": values_THD.float().cpu(), "index": index_T}
        if self.rope is not None:
            keys_THD = key_BHTD[0].transpose(0, 1)[index_T.to(key_BHTD.device)]
            part["keys"] = self.rope.to(keys_THD.device).unrotate(keys_THD, index_T + offset).cpu()
        self.parts.append(part)

    def finish(self) -> LayerStates:
        return LayerStates.from_tensors(
            {name: torch.cat([part[name] for part in self.parts]).contiguous() for name in self.parts[0]}
        )
