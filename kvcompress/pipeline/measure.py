"""Third pass: what the codec costs each layer's output, on a few calibration samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvcompress.calibration.capture import Collector, exact_attention, stored_linear
from kvcompress.codec import canary
from kvcompress.codec.contract import CacheCodec
from kvcompress.methods.context import Context
from kvcompress.modeling.low_rank import LowRankLinear
from kvcompress.pipeline.witness import Witness

if TYPE_CHECKING:
    from kvcompress.calibration.corpus import Calibration

PROBES = 2
"""Calibration samples on which the error is measured."""

UNIT = "measure"

Errors = dict[str, float]
"""Relative error of the attention output after o_proj: of keys alone ("k"), of values alone ("v"), and "both".

For scalar codes also the share of tokens and heads that clip (`codec.scalar.CLIP_THRESHOLD`): "k_clipped", "v_clipped".
"""


def measure(
    codecs: Sequence[CacheCodec | None], context: Context, prompt: Callable[[], list[int]]
) -> tuple[list[Errors], dict[str, Any]]:
    """Errors of every layer, empty where there is no codec, and what the codecs state of a prompt.

    The latter is a `codec.canary.ModelStatement` as JSON.
    """
    if not context.work.done(UNIT):
        context.work.commit(UNIT, {}, _measure(codecs, context, prompt()))
    errors, statement = context.work.data(UNIT)
    return errors, statement


def _measure(
    codecs: Sequence[CacheCodec | None], context: Context, prompt: list[int]
) -> tuple[list[Errors], dict[str, Any]]:
    runner, probes = context.runner(), _probes(context.calibration)
    hidden_NTC = runner.embed(probes)
    errors: list[Errors] = [{} for _ in codecs]
    witness = Witness(runner, prompt, len(codecs))
    waiting: dict[int, _Recorder] = {}
    for index, codec in enumerate(codecs):
        context.progress("measuring layers", index, len(codecs))
        with runner.layer(index) as layer:
            recorder = None if codec is None else _Recorder(runner.output_projection(layer))
            runner.advance(layer, hidden_NTC, probes, None if recorder is None else recorder.of_sample)
            witness.see(layer, index)
        if codec is None or recorder is None:
            continue
        waiting[index] = recorder
        # Layers that share a latent wait for the last of their group.
        group = codec.spec.group or (index,)
        if index == group[-1]:
            together = [codecs[member].to(runner.device) for member in group]  # type: ignore[union-attr]
            for member, found in zip(group, _group_errors(together, [waiting.pop(i) for i in group]), strict=True):
                errors[member] = found
            witness.state(group, together)
    context.progress("measuring layers", len(codecs), len(codecs))
    return errors, witness.statement.to_json()


def _probes(calibration: Calibration) -> Calibration:
    return replace(calibration, tokens_NT=calibration.tokens_NT[-PROBES:], offsets_N=calibration.offsets_N[-PROBES:])


@dataclass(frozen=True)
class _Sample:
    """One sample as an attention layer got it, and the position it starts at."""

    query_BHTD: Tensor
    key_BHTD: Tensor
    value_BHTD: Tensor
    softmax_scale: float
    offset: int


class _Recorder:
    """Keeps one layer's samples and its output projection."""

    def __init__(self, output: nn.Linear | LowRankLinear) -> None:
        self.samples: list[_Sample] = []
        # The layer lets go of its weights before its group is complete.
        self.output = copy.copy(output)
        self.output._parameters = {
            name: None if parameter is None else nn.Parameter(parameter.detach(), requires_grad=False)
            for name, parameter in output._parameters.items()
        }

    def of_sample(self, _sample: int, offset: int) -> Collector:
        """A collector for one sample."""

        def collect(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> None:
            self.samples.append(_Sample(query, key, value, softmax_scale, offset))

        return collect


def _group_errors(codecs: Sequence[CacheCodec], recorders: Sequence[_Recorder]) -> list[Errors]:
    """Errors of layers that are decoded together, in their order."""
    meters = [_ErrorMeter(codec, recorder.output) for codec, recorder in zip(codecs, recorders, strict=True)]
    for samples in zip(*(recorder.samples for recorder in recorders), strict=True):
        for meter, sample, decoded in zip(meters, samples, _through(codecs, samples), strict=True):
            meter.add(sample, *decoded)
    return [meter.relative() for meter in meters]


def _through(codecs: Sequence[CacheCodec], samples: Sequence[_Sample]) -> list[tuple[Tensor, Tensor]]:
    """Every layer's keys and values of one sample as attention would read them back, all tokens from the cache."""
    keys, values = (
        [states_BHTD[0].transpose(0, 1) for states_BHTD in sides]
        for sides in zip(*((sample.key_BHTD, sample.value_BHTD) for sample in samples), strict=True)
    )
    positions_T = torch.arange(keys[0].shape[0], device=keys[0].device) + samples[0].offset
    decoded = codecs[0].round_trip(codecs, keys, values, positions_T)
    return [
        (k_THD.transpose(0, 1)[None].to(sample.key_BHTD.dtype), v_THD.transpose(0, 1)[None].to(sample.value_BHTD.dtype))
        for (k_THD, v_THD), sample in zip(decoded, samples, strict=True)
    ]


class _ErrorMeter:
    """Accumulates squared errors of the attention output, as the layer's output projection sees them."""

    def __init__(self, codec: CacheCodec, output: nn.Linear | LowRankLinear) -> None:
        self.codec, self.output = codec, output
        self.energy = 0.0
        self.entries = 0
        self.errors = {"k": 0.0, "v": 0.0, "both": 0.0}
        self.clipped = {"k": 0, "v": 0}
        self.seen = 0

    def add(self, sample: _Sample, decoded_key: Tensor, decoded_value: Tensor) -> None:
        query, scale = sample.query_BHTD, sample.softmax_scale
        exact = self._project(exact_attention(query, sample.key_BHTD, sample.value_BHTD, scale))
        self.energy += float(exact.square().sum())
        self.entries += exact.numel()
        for name in self.errors:
            keys = sample.key_BHTD if name == "v" else decoded_key
            values = sample.value_BHTD if name == "k" else decoded_value
            approximate = self._project(exact_attention(query, keys, values, scale))
            self.errors[name] += float((approximate - exact).square().sum())
        if hasattr(self.codec, "clips"):
            self.seen += sample.key_BHTD[..., 0].numel()
            states = (states.transpose(1, 2).flatten(0, 1) for states in (sample.key_BHTD, sample.value_BHTD))
            for name, clips_TH in self.codec.clips(*states).items():
                self.clipped[name] += int(clips_TH.sum())

    def relative(self) -> Errors:
        least = canary.SMALLEST**2 * self.entries
        errors = {name: (error / max(self.energy, least)) ** 0.5 for name, error in self.errors.items()}
        return errors | {f"{name}_clipped": count / self.seen for name, count in self.clipped.items() if self.seen}

    def _project(self, attention_BHTD: Tensor) -> Tensor:
        return stored_linear(self.output, attention_BHTD.transpose(1, 2).flatten(2))
