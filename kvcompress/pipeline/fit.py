"""One layer: capture its statistics, fit the recipe's codec, measure what the codec costs the layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvcompress.calibration.capture import LayerRunner, exact_attention, stored_linear
from kvcompress.calibration.statistics import LayerAccumulator, LayerStatistics
from kvcompress.codec.layer import LayerCodec, SideCodec
from kvcompress.methods.base import LatentBasis
from kvcompress.methods.registry import basis_of, encoding_of
from kvcompress.pipeline.plan import Plan

PROBES = 2
"""Calibration samples on which the layer's error is measured."""

_SCALE_FLOOR = 1e-4
"""Smallest static scale, as a share of the head's largest: a channel that never moved still needs a unit."""


@dataclass(frozen=True)
class FittedLayer:
    codec: LayerCodec | None
    errors: dict[str, float]
    """Relative error of the layer's attention output after o_proj: of K alone, of V alone, and of both."""


def fit_layer(
    runner: LayerRunner, plan: Plan, index: int, hidden_NTC: Tensor, offsets_N: np.ndarray[Any, Any]
) -> FittedLayer:
    """Fit one layer and advance `hidden_NTC` in place to the layer's output."""
    compressed = plan.spec.layers[index] is not None
    accumulator = LayerAccumulator()
    first_probe = max(0, len(hidden_NTC) - PROBES)
    probes_NTC = hidden_NTC[first_probe:].clone()
    with runner.layer(index) as layer:
        for sample, offset in enumerate(offsets_N.tolist()):
            collect = accumulator.add if compressed else None
            hidden_NTC[sample] = runner.forward(layer, hidden_NTC[sample], offset, collect)
        if not compressed:
            return FittedLayer(None, {})
        attention: Any = layer.self_attn
        output = attention.o_proj
        codec = _codec(plan, accumulator.finish(output.weight))
        errors = _ErrorMeter(codec.to(runner.device), output)
        for probe_TC, offset in zip(probes_NTC, offsets_N[first_probe:].tolist(), strict=True):
            runner.forward(layer, probe_TC, offset, errors.add)
    return FittedLayer(codec, errors.relative())


def _codec(plan: Plan, statistics: LayerStatistics) -> LayerCodec:
    basis_method, basis_stage = basis_of(plan.recipe)
    encoding, encoding_stage = encoding_of(plan.recipe)
    ranks = basis_method.ranks(basis_stage, plan.geometry)
    sides = {}
    for name, rank, basis in zip(("k", "v"), ranks, basis_method.fit(basis_stage, statistics), strict=True):
        variance_R = basis.variance_HR.mean(0)[:rank].tolist()
        spec = encoding.spec(encoding_stage, name, rank, plan.geometry.head_dim, variance_R)
        scale_HR = _scale(basis)[:, : spec.rank].contiguous()
        sides[name] = SideCodec(
            spec,
            basis.mean_HD,
            basis.basis_HDR[..., : spec.rank].contiguous(),
            basis.inverse_HRD[:, : spec.rank].contiguous(),
            scale_HR,
        )
    return LayerCodec(sides["k"], sides["v"])


def _scale(basis: LatentBasis) -> Tensor:
    deviation_HR = basis.variance_HR.sqrt()
    largest = deviation_HR.amax(-1, keepdim=True)
    return torch.where(largest > 0, torch.maximum(deviation_HR, _SCALE_FLOOR * largest), torch.ones_like(deviation_HR))


class _ErrorMeter:
    """Accumulates squared errors of the attention output, as the layer's output projection sees them."""

    def __init__(self, codec: LayerCodec, output: nn.Linear) -> None:
        self.codec, self.output = codec, output
        self.energy = 0.0
        self.errors = {"k": 0.0, "v": 0.0, "both": 0.0}

    def add(self, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> None:
        decoded = {"k": _through(self.codec.k, key), "v": _through(self.codec.v, value)}
        exact = self._project(exact_attention(query, key, value, softmax_scale))
        self.energy += float(exact.square().sum())
        for name in self.errors:
            keys = key if name == "v" else decoded["k"]
            values = value if name == "k" else decoded["v"]
            approximate = self._project(exact_attention(query, keys, values, softmax_scale))
            self.errors[name] += float((approximate - exact).square().sum())

    def relative(self) -> dict[str, float]:
        return {name: (error / max(self.energy, 1e-30)) ** 0.5 for name, error in self.errors.items()}

    def _project(self, attention_BHTD: Tensor) -> Tensor:
        return stored_linear(self.output, attention_BHTD.transpose(1, 2).flatten(2))


def _through(side: SideCodec, states_BHTD: Tensor) -> Tensor:
    batch = states_BHTD.shape[0]
    x_THD = states_BHTD.transpose(1, 2).flatten(0, 1)
    decoded: Tensor = side.reconstruct(*side.encode(x_THD)).unflatten(0, (batch, -1))
    return decoded.transpose(1, 2).to(states_BHTD.dtype)
