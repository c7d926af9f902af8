"""The predicted error of a layer's output against errors really put into scores and values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcompress.calibration.sensitivity import QUERIES, SensitivityAccumulator
from kvcompress.calibration.statistics import LayerAccumulator

KV_HEADS, GROUP, HEAD_DIM, TOKENS, HIDDEN, SCALE = 2, 3, 16, 97, 80, 0.25


@pytest.fixture(scope="module")
def layer() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "query": 2 * randn(1, KV_HEADS * GROUP, TOKENS, HEAD_DIM),
        "key": randn(1, KV_HEADS, TOKENS, HEAD_DIM),
        "value": randn(1, KV_HEADS, TOKENS, HEAD_DIM) + 0.5,
        "weight": randn(HIDDEN, KV_HEADS * GROUP * HEAD_DIM),
        "hidden": 7 * randn(1, TOKENS, HIDDEN),
    }


def positions() -> Tensor:
    return torch.linspace(0, TOKENS - 1, QUERIES + 1)[1:].round().long()


def output(layer: dict[str, Tensor], score_errors: Tensor | None = None, value_errors: Tensor | None = None) -> Tensor:
    """The layer's output at the queries that are looked at, spelt out in float64 `[queries, hidden]`."""
    key, value = (layer[name][0].double().repeat_interleave(GROUP, 0) for name in ("key", "value"))
    scores = layer["query"][0, :, positions()].double() @ key.mT * SCALE
    if score_errors is not None:
        scores = scores + score_errors
    if value_errors is not None:
        value = value + value_errors.repeat_interleave(GROUP, 0)
    scores = scores.masked_fill(torch.arange(TOKENS) > positions()[:, None], -torch.inf)
    mixed_HQD = scores.softmax(-1) @ value
    return mixed_HQD.transpose(0, 1).flatten(1) @ layer["weight"].double().mT


def sensitivities(layer: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    accumulator = SensitivityAccumulator()
    accumulator.add(layer["query"], layer["key"], layer["value"], SCALE, layer["hidden"])
    return accumulator.finish(layer["weight"], KV_HEADS)


def stream_energy(layer: dict[str, Tensor]) -> float:
    return float((layer["hidden"][0, positions()].double() + output(layer)).square().sum(1).median())


@pytest.mark.parametrize("head", range(KV_HEADS))
def test_errors_of_scores(layer: dict[str, Tensor], head: int) -> None:
    generator, found, size = torch.Generator().manual_seed(1), 0.0, 1e-3
    for _ in range(200):
        errors = torch.zeros(KV_HEADS * GROUP, QUERIES, TOKENS, dtype=torch.float64)
        errors[head * GROUP : (head + 1) * GROUP] = size * torch.randn(GROUP, QUERIES, TOKENS, generator=generator)
        found += float((output(layer, errors) - output(layer)).square().sum(1).mean()) / 200
    predicted = size**2 * float(sensitivities(layer)[0][head]) * stream_energy(layer)
    assert found == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize("head", range(KV_HEADS))
def test_errors_of_values(layer: dict[str, Tensor], head: int) -> None:
    """Isotropic errors: their square in the output moment is its trace. Query heads of a group share the error, so the
    prediction leaves out how alike their attention and their projections are: a few percent here."""
    generator, found, size = torch.Generator().manual_seed(2), 0.0, 1e-3
    for _ in range(200):
        errors = torch.zeros(KV_HEADS, TOKENS, HEAD_DIM, dtype=torch.float64)
        errors[head] = size * torch.randn(TOKENS, HEAD_DIM, generator=generator)
        found += float((output(layer, value_errors=errors) - output(layer)).square().sum(1).mean()) / 200
    accumulator = LayerAccumulator()
    accumulator.add(layer["query"], layer["key"], layer["value"], SCALE, layer["hidden"])
    statistics = accumulator.finish(layer["weight"])
    trace = float(statistics.output_moment_HDD[head].trace())
    predicted = size**2 * trace * float(statistics.value_sensitivity_H[head]) * stream_energy(layer)
    assert found == pytest.approx(predicted, rel=0.25)


def test_a_token_of_enormous_size_does_not_hide_the_others(layer: dict[str, Tensor]) -> None:
    massive = layer | {"hidden": layer["hidden"].clone()}
    massive["hidden"][0, positions()[3]] *= 1e4
    for found, expected in zip(sensitivities(massive), sensitivities(layer), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.2, atol=0)


def test_batches_and_parts_add_up(layer: dict[str, Tensor]) -> None:
    parts = SensitivityAccumulator()
    for _ in range(3):
        parts.add(layer["query"], layer["key"], layer["value"], SCALE, layer["hidden"])
    for found, expected in zip(parts.finish(layer["weight"], KV_HEADS), sensitivities(layer), strict=True):
        torch.testing.assert_close(found, expected)


def test_short_samples() -> None:
    accumulator = SensitivityAccumulator()
    one = torch.ones(1, 2, 1, 8)
    accumulator.add(one, one[:, :1], one[:, :1], 1.0, None)
    keys_H, values_H = accumulator.finish(torch.eye(16), 1)
    assert keys_H.tolist() == [0.0]  # one token has all the attention, whatever its score
    assert values_H.tolist() == pytest.approx([1 / 16])
