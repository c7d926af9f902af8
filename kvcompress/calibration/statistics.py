"""Second moments of what an attention layer sees, in float64 so that the order of batches hardly matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.calibration.sensitivity import SensitivityAccumulator


@dataclass(frozen=True)
class Moments:
    """Mean `[heads, head_dim]` and covariance `[heads, head_dim, head_dim]`, float64."""

    mean_HD: Tensor
    covariance_HDD: Tensor
    first_HDD: Tensor
    """E[(x - mean) (x - mean)^T] over the samples' first tokens, which in large models are attention sinks."""


@dataclass(frozen=True)
class LayerStatistics:
    """What the methods may know about one layer. Keys and queries after RoPE; all tensors float64 on the CPU."""

    keys: Moments
    values: Moments
    query_moment_HDD: Tensor
    """E[q q^T] over tokens and over the query heads of each KV head's group, softmax scale included."""
    output_moment_HDD: Tensor
    """Sum over the group's query heads of W_o,h^T W_o,h: how the layer's output sees an error in the values."""
    key_sensitivity_H: Tensor
    """Squared error that one KV head's errors leave in the layer's output, relative to the residual stream, per squared
    error of its scores (`calibration.sensitivity`)."""
    value_sensitivity_H: Tensor
    """The same per squared error of its values, as the output projection sees them."""
    tokens: int

    def tensors(self) -> dict[str, Tensor]:
        """Flat form for a safetensors file."""
        return {
            "keys.mean": self.keys.mean_HD,
            "keys.covariance": self.keys.covariance_HDD,
            "keys.first": self.keys.first_HDD,
            "values.mean": self.values.mean_HD,
            "values.covariance": self.values.covariance_HDD,
            "values.first": self.values.first_HDD,
            "query_moment": self.query_moment_HDD,
            "output_moment": self.output_moment_HDD,
            "sensitivity.keys": self.key_sensitivity_H,
            "sensitivity.values": self.value_sensitivity_H,
            "tokens": torch.tensor([self.tokens]),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LayerStatistics:
        """Inverse of `tensors`."""
        keys, values = (
            Moments(tensors[f"{side}.mean"], tensors[f"{side}.covariance"], tensors[f"{side}.first"])
            for side in ("keys", "values")
        )
        return cls(
            keys,
            values,
            tensors["query_moment"],
            tensors["output_moment"],
            tensors["sensitivity.keys"],
            tensors["sensitivity.values"],
            int(tensors["tokens"]),
        )


class MomentAccumulator:
    """Running mean and second moment per head, on the device of the data."""

    def __init__(self) -> None:
        self.count = 0
        self.sum_HD: Tensor | None = None
        self.square_HDD: Tensor | None = None

    def add(self, x_THD: Tensor) -> None:
        x = x_THD.double().transpose(0, 1)
        total, square = x.sum(1), x.mT @ x
        self.sum_HD = total if self.sum_HD is None else self.sum_HD + total
        self.square_HDD = square if self.square_HDD is None else self.square_HDD + square
        self.count += x.shape[1]

    def second_moment(self) -> Tensor:
        """E[x x^T], not centred."""
        assert self.square_HDD is not None, "no data was added"
        return (self.square_HDD / self.count).cpu()

    def mean(self) -> Tensor:
        """E[x]."""
        assert self.sum_HD is not None, "no data was added"
        return (self.sum_HD / self.count).cpu()


class SideAccumulator:
    """Keys or values of one layer."""

    def __init__(self) -> None:
        self.all, self.first = MomentAccumulator(), MomentAccumulator()

    def add(self, x_BHTD: Tensor) -> None:
        """A batch of samples, each from its first token on."""
        self.all.add(_tokens_first(x_BHTD))
        self.first.add(x_BHTD[:, :, 0])

    def moments(self) -> Moments:
        mean, first = self.all.mean(), self.first.mean()
        apart = first - mean
        return Moments(
            mean,
            self.all.second_moment() - _outer(mean),
            self.first.second_moment() - _outer(first) + _outer(apart),
        )


class LayerAccumulator:
    """Collects one layer's statistics from the tensors its attention function receives."""

    def __init__(self) -> None:
        self.keys, self.values, self.queries = SideAccumulator(), SideAccumulator(), MomentAccumulator()
        self.sensitivity = SensitivityAccumulator()

    def add(
        self,
        query_BHTD: Tensor,
        key_BHTD: Tensor,
        value_BHTD: Tensor,
        softmax_scale: float,
        hidden_BTC: Tensor | None = None,
    ) -> None:
        """One batch of post-RoPE queries `[batch, query heads, tokens, head_dim]`, keys and values.

        Args:
            hidden_BTC: the residual stream before attention; without it sensitivities are relative to the output alone.
        """
        kv_heads = key_BHTD.shape[1]
        self.keys.add(key_BHTD)
        self.values.add(value_BHTD)
        grouped = query_BHTD.unflatten(1, (kv_heads, -1)).transpose(1, 2).flatten(0, 1)
        self.queries.add(_tokens_first(grouped) * softmax_scale)
        self.sensitivity.add(query_BHTD, key_BHTD, value_BHTD, softmax_scale, hidden_BTC)

    def finish(self, output_weight: Tensor) -> LayerStatistics:
        """Close the layer.

        Args:
            output_weight: o_proj's weight `[hidden, query heads * head_dim]`.
        """
        keys, values = self.keys.moments(), self.values.moments()
        kv_heads, head_dim = keys.mean_HD.shape
        # Head by head: in float64 the whole matrix would be the largest thing in memory.
        blocks = output_weight.detach().unflatten(1, (kv_heads, -1, head_dim)).unbind(1)
        output_moment = torch.stack([_gram(block.flatten(0, 1)) for block in blocks])
        key_sensitivity_H, value_sensitivity_H = self.sensitivity.finish(output_weight, kv_heads)
        return LayerStatistics(
            keys=keys,
            values=values,
            query_moment_HDD=self.queries.second_moment(),
            output_moment_HDD=output_moment.cpu(),
            key_sensitivity_H=key_sensitivity_H,
            value_sensitivity_H=value_sensitivity_H,
            tokens=self.keys.all.count,
        )


def _gram(rows_ND: Tensor) -> Tensor:
    rows = rows_ND.double()
    return rows.mT @ rows


def _outer(x_HD: Tensor) -> Tensor:
    return x_HD[..., :, None] * x_HD[..., None, :]


def _tokens_first(x_BHTD: Tensor) -> Tensor:
    return x_BHTD.transpose(1, 2).flatten(0, 1)
