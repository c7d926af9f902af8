"""Third pass: what the codec costs each layer's output, on a few calibration samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from kvcompress.calibration.capture import exact_attention, stored_linear
from kvcompress.codec.forms import CacheCodec
from kvcompress.methods.context import Context
from kvcompress.modeling.low_rank import LowRankLinear

if TYPE_CHECKING:
    from kvcompress.calibration.corpus import Calibration

PROBES = 2
"""Calibration samples on which the error is measured."""

UNIT = "measure"

Errors = dict[str, float]
"""Relative error of the attention output after o_proj: of keys alone ("k"), of values alone ("v"), and "both"."""


def measure(codecs: Sequence[CacheCodec | None], context: Context) -> list[Errors]:
    """Errors of every layer, empty where there is no codec."""
    if not context.work.done(UNIT):
        context.work.commit(UNIT, {}, _measure(codecs, context))
    errors: list[Errors] = context.work.data(UNIT)
    return errors


def _measure(codecs: Sequence[CacheCodec | None], context: Context) -> list[Errors]:
    runner, probes = context.runner(), _probes(context.calibration)
    hidden_NTC = runner.embed(probes)
    errors: list[Errors] = []
    for index, codec in enumerate(codecs):
        context.progress("measuring layers", index, len(codecs))
        with runner.layer(index) as layer:
            meter = None
            if codec is not None:
                meter = _ErrorMeter(codec.to(runner.device), runner.output_projection(layer))
            for sample, offset in enumerate(probes.offsets_N.tolist()):
                collect = None if meter is None else meter.add
                hidden_NTC[sample] = runner.forward(layer, hidden_NTC[sample], offset, collect)
        errors.append({} if meter is None else meter.relative())
    context.progress("measuring layers", len(codecs), len(codecs))
    return errors


def _probes(calibration: Calibration) -> Calibration:
    return replace(calibration, tokens_NT=calibration.tokens_NT[-PROBES:], offsets_N=calibration.offsets_N[-PROBES:])


class _ErrorMeter:
    """Accumulates squared errors of the attention output, as the layer's output projection sees them."""

    def __init__(self, codec: CacheCodec, output: nn.Linear | LowRankLinear) -> None:
        self.codec, self.output = codec, output
        self.energy = 0.0
        self.errors = {"k": 0.0, "v": 0.0, "both": 0.0}

    def add(self, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> None:
        decoded_key, decoded_value = _through(self.codec, key, value)
        exact = self._project(exact_attention(query, key, value, softmax_scale))
        self.energy += float(exact.square().sum())
        for name in self.errors:
            keys = key if name == "v" else decoded_key
            values = value if name == "k" else decoded_value
            approximate = self._project(exact_attention(query, keys, values, softmax_scale))
            self.errors[name] += float((approximate - exact).square().sum())

    def relative(self) -> Errors:
        return {name: (error / max(self.energy, 1e-30)) ** 0.5 for name, error in self.errors.items()}

    def _project(self, attention_BHTD: Tensor) -> Tensor:
        return stored_linear(self.output, attention_BHTD.transpose(1, 2).flatten(2))


def _through(codec: CacheCodec, key_BHTD: Tensor, value_BHTD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as attention would read them back."""
    batch = key_BHTD.shape[0]
    states = [states_BHTD.transpose(1, 2).flatten(0, 1) for states_BHTD in (key_BHTD, value_BHTD)]
    decoded = (side_THD.unflatten(0, (batch, -1)).transpose(1, 2) for side_THD in codec.round_trip(*states))
    keys, values = decoded
    return keys.to(key_BHTD.dtype), values.to(value_BHTD.dtype)
