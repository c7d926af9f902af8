"""Massive activations: the reference model's attention with a first token whose keys and values are extreme.

Large models have such tokens (Sun et al., 2024, arXiv 2402.17762), the reference model has none, so they are planted in
what its layers really see: two channels of K and of V, a hundred times their size, at the first position. Calibration
sees them, because every calibration sample starts where a prompt starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from kvcompress.calibration import corpus
from kvcompress.calibration.capture import LayerRunner, exact_attention
from kvcompress.calibration.statistics import LayerAccumulator
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.codec.contract import CacheCodec
from kvcompress.geometry import ModelGeometry
from kvcompress.methods import registry
from kvcompress.methods.base import EncodingMethod, LayerBases, Profile
from kvcompress.methods.pca import Pca, PcaConfig

MODEL = Path(__file__).parents[2] / "assets" / "reference-model"
TEXT = Path(corpus.__file__).parent / "builtin" / "documentation.txt"
"""Of one kind: what is compared here are activations with and without a massive token."""

SAMPLES, LENGTH, PROBES, CHANNELS, FACTOR = 8, 256, 2, [3, 40], 100


class Sample(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


class Layer(NamedTuple):
    samples: list[Sample]
    weight: Tensor


class Fitted(NamedTuple):
    """A layer with the basis and the variances that calibration on it gives."""

    layer: Layer
    bases: LayerBases
    profile: Profile


class Errors(NamedTuple):
    """Relative errors of the attention output and of the attention that the first token gets."""

    output: float
    sink: float


@pytest.fixture(scope="module")
def geometry() -> ModelGeometry:
    return ModelGeometry.from_config(Checkpoint.open(MODEL).config)


@pytest.fixture(scope="module")
def layers(geometry: ModelGeometry) -> list[tuple[Fitted, Fitted]]:
    """Every layer as it is, and with the massive token."""
    checkpoint = Checkpoint.open(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = corpus.Corpus(str(TEXT), tokenizer, geometry.vocab_size, lambda *_: None)
    calibration = text.sample(SAMPLES, LENGTH, geometry.context, seed=0)
    runner, captured = LayerRunner(checkpoint, "cpu", torch.float32), []
    hidden_NTC = runner.embed(calibration)
    for index in range(geometry.num_layers):
        samples: list[Sample] = []
        with runner.layer(index) as layer:
            for sample, offset in enumerate(calibration.offsets_N.tolist()):
                hidden_NTC[sample] = runner.forward(
                    layer, hidden_NTC[sample], offset, lambda q, k, v, s, to=samples: to.append(Sample(q, k, v, s))
                )
            captured.append(Layer(samples, runner.output_projection(layer).weight.detach().float().clone()))
    return [(fit(layer), fit(planted(layer))) for layer in captured]


def fit(layer: Layer) -> Fitted:
    accumulator = LayerAccumulator()
    for sample in layer.samples:
        accumulator.add(*sample)
    bases = LayerBases(*Pca().fit(PcaConfig(), accumulator.finish(layer.weight)))
    variances = (side.variance_HR.mean(0).tolist() for side in (bases.k, bases.v))
    return Fitted(layer, bases, Profile(64, 64, *variances))


def planted(layer: Layer) -> Layer:
    samples = []
    for sample in layer.samples:
        key, value = sample.key.clone(), sample.value.clone()
        key[:, :, 0, CHANNELS] *= FACTOR
        value[:, :, 0, CHANNELS] *= FACTOR
        samples.append(Sample(sample.query, key, value, sample.scale))
    return Layer(samples, layer.weight)


def errors(fitted: Fitted, geometry: ModelGeometry, **parameters: Any) -> Errors:
    method: EncodingMethod[Any] = registry.METHODS[parameters.pop("method", "scalar")]  # type: ignore[assignment]
    config = method.config.model_validate({"method": method.name, **parameters})
    spec = method.layers(config, geometry, [fitted.profile])[0]
    return measured(method.codec(config, spec, fitted.bases), fitted.layer)


def measured(codec: CacheCodec, layer: Layer) -> Errors:
    sums = torch.zeros(4, dtype=torch.float64)
    for sample in layer.samples[-PROBES:]:
        states = (sample.key[0].transpose(0, 1), sample.value[0].transpose(0, 1))
        key, value = (
            side_THD.transpose(0, 1)[None]
            for side_THD in codec.round_trip([codec], states[:1], states[1:], torch.arange(len(states[0])))[0]
        )
        found = sample._replace(key=key, value=value)
        for place, part in ((0, outputs), (2, sink_attention)):
            exact = part(sample, layer).double()
            sums[place] += (part(found, layer).double() - exact).square().sum()
            sums[place + 1] += exact.square().sum()
    return Errors(float((sums[0] / sums[1]).sqrt()), float((sums[2] / sums[3]).sqrt()))


def outputs(sample: Sample, layer: Layer) -> Tensor:
    return exact_attention(*sample).transpose(1, 2).flatten(2) @ layer.weight.mT


def sink_attention(sample: Sample, layer: Layer) -> Tensor:
    key = sample.key.repeat_interleave(sample.query.shape[1] // sample.key.shape[1], 1)
    scores = sample.query @ key.mT * sample.scale
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)[..., 1:, 0]


def growth(
    layers: list[tuple[Fitted, Fitted]], geometry: ModelGeometry, **parameters: Any
) -> list[tuple[Errors, Errors]]:
    return [(errors(plain, geometry, **parameters), errors(sink, geometry, **parameters)) for plain, sink in layers]


def mean_growth(pairs: list[tuple[Errors, Errors]], name: str) -> float:
    before, after = (sum(getattr(pair[i], name) for pair in pairs) for i in (0, 1))
    return after / before


BOTH = {"k": 4.0, "v": 4.0}


@pytest.mark.parametrize("outliers", [1, 2])
@pytest.mark.parametrize("size", [{"bits": 4}, {"target_bits_per_channel": BOTH}], ids=["4 bits", "bands"])
def test_four_bits_with_outliers_bear_a_massive_first_token(
    layers: list[tuple[Fitted, Fitted]], geometry: ModelGeometry, size: dict[str, Any], outliers: int
) -> None:
    pairs = growth(layers, geometry, **size, outliers=outliers)
    assert mean_growth(pairs, "output") <= 1.2
    assert mean_growth(pairs, "sink") <= 1.2


@pytest.mark.parametrize("outliers", [0.0, 0.02])
def test_four_bit_blocks_bear_it(layers: list[tuple[Fitted, Fitted]], geometry: ModelGeometry, outliers: float) -> None:
    pairs = growth(layers, geometry, method="gear", bits=4, outliers=outliers)
    assert mean_growth(pairs, "output") <= 1.2
    assert mean_growth(pairs, "sink") <= 1.2


def test_two_outliers_bear_it_in_every_layer(layers: list[tuple[Fitted, Fitted]], geometry: ModelGeometry) -> None:
    for before, after in growth(layers, geometry, bits=4, outliers=2):
        assert after.output <= 1.2 * before.output


def test_outliers_are_what_it_takes(layers: list[tuple[Fitted, Fitted]], geometry: ModelGeometry) -> None:
    """Without them the same activations do show: the tests above would notice."""
    assert mean_growth(growth(layers, geometry, bits=4), "output") > 1.3
