"""What a codec states about itself: a fixed prompt, and what becomes of every layer's keys and values on it.

Hashes tell that files are those that were written. They do not tell that the right thing was written, nor that the
engine which serves it computes the keys that the codec was made for. So a checkpoint carries a statement about one
prompt, under its hashes, and a server runs that prompt before its first request and compares (`serving.vllm.canary`).

Per KV head, because a tensor-parallel rank has only some of them, and because a fault in one head must not drown in
the others:

    error   ||decode(encode(x)) - x|| / ||x||      over all tokens of the prompt
    sketch  projections of x on fixed random directions: two sketches differ relatively as much as what they are of,
            up to the accuracy of that many directions
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress.codec.contract import CacheCodec

PROMPT_TOKENS = 192
"""Of the bundled text: what the codec was calibrated for, and nobody's private data."""

DIRECTIONS = 4
"""Numbers in the sketch of one head."""

SMALLEST = 1e-6
"""Root mean square below which states, or what attention makes of them, are nothing: an error is not relative to less.
A layer that a merge has switched off computes zeros, or what rounding leaves of them.
"""

_DIGITS = 6


def unstated_prompt(vocab_size: int) -> list[int]:
    """For a checkpoint that states nothing: always the same ids."""
    return torch.randint(vocab_size, (PROMPT_TOKENS,), generator=_generator()).tolist()


@dataclass(frozen=True)
class SideStatement:
    """Keys or values of one layer on the prompt; letter P: directions."""

    error_H: Tensor
    sketch_HP: Tensor

    @classmethod
    def of(cls, x_THD: Tensor, decoded_THD: Tensor) -> SideStatement:
        """From keys or values and what attention reads of them."""
        return cls(relative_error(x_THD, decoded_THD), sketch(x_THD))

    def heads(self, start: int, stop: int) -> SideStatement:
        """KV heads [start, stop): those of one tensor-parallel rank."""
        return SideStatement(self.error_H[start:stop], self.sketch_HP[start:stop])

    def without_error(self) -> SideStatement:
        """For a codec that is served at a smaller rank than was stated: it may lose anything but more than all."""
        return SideStatement(torch.ones_like(self.error_H), self.sketch_HP)

    def to_json(self) -> dict[str, Any]:
        return {"error": _rounded(self.error_H), "sketch": [_rounded(row) for row in self.sketch_HP]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SideStatement:
        return cls(torch.tensor(data["error"]), torch.tensor(data["sketch"]))


Statement = dict[str, SideStatement]
"""Both sides of one layer, by name ("k", "v")."""


@dataclass(frozen=True)
class ModelStatement:
    """The prompt and every layer's statement; None for a layer without a codec."""

    tokens: list[int]
    layers: list[Statement | None]

    def without_errors(self) -> ModelStatement:
        """`SideStatement.without_error` of every side."""
        layers = [
            None if layer is None else {name: side.without_error() for name, side in layer.items()}
            for layer in self.layers
        ]
        return ModelStatement(self.tokens, layers)

    def to_json(self) -> dict[str, Any]:
        layers = [
            None if layer is None else {name: side.to_json() for name, side in layer.items()} for layer in self.layers
        ]
        return {"tokens": self.tokens, "layers": layers}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelStatement:
        """Inverse of `to_json`.

        Raises:
            ValueError: anything that is not a statement.
        """
        try:
            layers = [
                None if layer is None else {name: SideStatement.from_json(layer[name]) for name in ("k", "v")}
                for layer in data["layers"]
            ]
            return cls([int(token) for token in data["tokens"]], layers)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the codec's statement cannot be read ({error!r}); compress the model again") from None


def state(codecs: Sequence[CacheCodec], keys_THD: Sequence[Tensor], values_THD: Sequence[Tensor]) -> list[Statement]:
    """The statements of layers that are decoded together, from the prompt's keys (after RoPE) and values, in order."""
    positions_T = torch.arange(keys_THD[0].shape[0], device=keys_THD[0].device)
    decoded = codecs[0].round_trip(codecs, keys_THD, values_THD, positions_T)
    return [
        {"k": SideStatement.of(key, read_key), "v": SideStatement.of(value, read_value)}
        for key, value, (read_key, read_value) in zip(keys_THD, values_THD, decoded, strict=True)
    ]


def relative_error(x_THD: Tensor, decoded_THD: Tensor) -> Tensor:
    """||decoded - x|| / ||x|| of each head, on the CPU."""
    lost_H = (decoded_THD.double() - x_THD.double()).square().mean((0, 2))
    return (lost_H / x_THD.double().square().mean((0, 2)).clamp_min(SMALLEST**2)).sqrt().float().cpu()


def sketch_difference(x_THD: Tensor, expected_HP: Tensor) -> float:
    """How far states are from those that a sketch was made of, relative to these."""
    smallest = SMALLEST * x_THD[:, :, 0].numel() ** 0.5  # of what the sketch is random projections of
    expected: float = max(float(expected_HP.norm()), smallest * (x_THD.shape[2] * DIRECTIONS) ** 0.5)
    return float((sketch(x_THD) - expected_HP).norm()) / expected


def sketch(x_THD: Tensor) -> Tensor:
    """Projections `[heads, directions]`, on the CPU."""
    tokens, _, head_dim = x_THD.shape
    directions_TDP = torch.randn(tokens, head_dim, DIRECTIONS, generator=_generator())
    return torch.einsum("thd,tdp->hp", x_THD.float().cpu(), directions_TDP)


def _generator() -> torch.Generator:
    digest = hashlib.sha256(b"kvcompress canary").digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6], "little"))


def _rounded(numbers: Tensor) -> list[float]:
    return [float(f"{number:.{_DIGITS}g}") for number in numbers.tolist()]
