from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress.codec.bands import CHANNEL_GROUP, Band, SideSpec
from kvcompress.codec.codes.registry import CODES
from kvcompress.geometry import ModelGeometry
from kvcompress.methods.base import Profile
from kvcompress.methods.scalar import Scalar, ScalarConfig, side_spec

EXPECTED_ERROR = {bits: code.expected_error for bits, code in CODES.items()} | {0: 1.0}
"""Of a unit-variance Gaussian channel; 0 bits drop it."""


def spec(rank: int = 64, head_dim: int = 64, variance: list[float] | None = None, **parameters: Any) -> SideSpec:
    return side_spec(made(**parameters), "k", rank, head_dim, variance)


def made(**parameters: Any) -> ScalarConfig:
    for name, value in parameters.items():
        if name == "target_bits_per_channel" and not isinstance(value, dict):
            parameters[name] = {"k": value, "v": value}
    return ScalarConfig.model_validate({"method": "scalar", **parameters})


def test_bits_and_bands() -> None:
    assert spec(48, bits={"k": 4, "v": 2}).bands == (Band(4, 48),)
    assert spec(bits=16).bands == (Band(16, 64),)
    assert spec(bits=32).bands == (Band(32, 64),)
    assert spec(bits=4, outliers={"k": 2, "v": 0}) == SideSpec((Band(4, 64),), 2)
    assert spec(target_bits_per_channel=3.0, outliers=1).outliers == 1
    assert spec(bands={"k": [[4, 8]], "v": [[4, 8]]}, outliers=1) == SideSpec((Band(4, 8),), 1)
    assert spec(bands={"k": [[8, 16], [2, 32]], "v": [[4, 8]]}).bands == (Band(8, 16), Band(2, 32))
    with pytest.raises(ValueError, match="cover 48 channels, but the basis keeps 40"):
        spec(40, bands={"k": [[8, 16], [2, 32]], "v": [[4, 8]]})


def brute_force(units: int, energy: list[float]) -> float:
    """Least error over every assignment of widths to channel groups, rising ones included."""
    costs = {0: 0, 1: 2, 2: 4, 4: 8}
    return min(
        sum(EXPECTED_ERROR[costs[cost]] * e for cost, e in zip(chosen, energy, strict=True))
        for chosen in itertools.product(costs, repeat=len(energy))
        if sum(chosen) == units
    )


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5).map(lambda e: sorted(e, reverse=True)),
    st.integers(1, 20).filter(lambda units: units != 19),
)
def test_target_is_spent_exactly_and_optimally(energy: list[float], units: int) -> None:
    rank = 5 * CHANNEL_GROUP
    variance = [e / CHANNEL_GROUP for e in energy for _ in range(CHANNEL_GROUP)]
    found = spec(rank, rank, variance, target_bits_per_channel=units * 2 * CHANNEL_GROUP / rank)
    assert 8 * found.code_bytes == units * 2 * CHANNEL_GROUP
    start, error = 0, 0.0
    for band in found.bands:
        groups = band.width // CHANNEL_GROUP
        error += EXPECTED_ERROR[band.bits] * sum(energy[start : start + groups])
        start += groups
    error += sum(energy[start:])
    assert error == pytest.approx(brute_force(units, energy), rel=1e-9)


@pytest.mark.parametrize("target", [1.0, 2.0, 3.25, 4.0, 6.5])
def test_size_does_not_depend_on_the_data(target: float) -> None:
    flat, steep = [1.0] * 64, [0.5**c for c in range(64)]
    sizes = {spec(variance=v, target_bits_per_channel=target).code_bytes for v in (None, flat, steep)}
    assert sizes == {round(target * 64 / 8)}


def test_truncated_basis_gives_its_bits_to_the_kept_channels() -> None:
    assert 8 * spec(32, 64, [1.0] * 32, target_bits_per_channel=3.0).code_bytes == 3 * 64
    with pytest.raises(ValueError, match="cannot be met with 16 of 64 channels"):
        spec(16, 64, target_bits_per_channel=3.0)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"bits": 4, "target_bits_per_channel": 3.0},
        {"bits": 5},
        {"bits": {"k": 4}},
        {"target_bits_per_channel": -1.0},
        {"bits": 4, "outliers": 3},
        {"bits": 16, "outliers": 1},
        {"bits": {"k": 4, "v": 32}, "outliers": {"k": 0, "v": 2}},
    ],
)
def test_bad_parameters(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        spec(**parameters)


def geometry(layers: int, head_dim: int) -> ModelGeometry:
    return ModelGeometry("LlamaForCausalLM", layers, 256, 4, 2, head_dim, 1024, 1000, (None,) * layers)


def joint(target: float, profiles: list[Profile], head_dim: int = 64, **parameters: Any) -> list[SideSpec]:
    """Every layer's keys and values, in turn."""
    config = ScalarConfig.model_validate({"method": "scalar", "target_bits_per_channel": target, **parameters})
    layers = Scalar().layers(config, geometry(len(profiles), head_dim), profiles)
    return [side for layer in layers for side in (layer.k, layer.v)]


def expected_error(side: SideSpec, variance: Sequence[float]) -> float:
    bits = [band.bits for band in side.bands for _ in range(band.width)]
    bits += [0] * (len(variance) - len(bits))
    return sum(EXPECTED_ERROR[b] * v for b, v in zip(bits, variance, strict=True))


profiles = st.builds(
    lambda k, v, k_weight, v_weight: Profile(
        len(k), len(v), sorted(k, reverse=True), sorted(v, reverse=True), k_weight, v_weight
    ),
    *[
        st.sampled_from([16, 24]).flatmap(lambda rank: st.lists(st.floats(0, 100), min_size=rank, max_size=rank))
        for _ in range(2)
    ],
    *[st.floats(1e-4, 1e4)] * 2,
)


@settings(deadline=None, max_examples=60)
@given(st.lists(profiles, min_size=2, max_size=2), st.data())
def test_one_budget_for_the_model_is_spent_exactly_and_optimally(layers: list[Profile], data: st.DataObject) -> None:
    groups = [rank // CHANNEL_GROUP for layer in layers for rank in (layer.k_rank, layer.v_rank)]
    top = 4 * sum(groups)
    units = data.draw(st.integers(len(groups), top).filter(lambda units: units != top - 1))
    found = joint(units * 16 / (len(groups) * 24), layers, 24)
    assert sum(8 * side.code_bytes for side in found) == units * 16
    sides = [
        (weight, list(variance))
        for layer in layers
        for weight, variance in ((layer.k_weight, layer.k_variance_R or []), (layer.v_weight, layer.v_variance_R or []))
    ]
    error = sum(weight * expected_error(side, variance) for side, (weight, variance) in zip(found, sides, strict=True))
    # Every way to spend on one side, then every way to add the sides up.
    tables: list[dict[int, float]] = []
    for weight, variance in sides:
        table: dict[int, float] = {}
        for widths in itertools.product((8, 4, 2, 0), repeat=len(variance) // CHANNEL_GROUP):
            if list(widths) == sorted(widths, reverse=True) and any(widths):
                side = SideSpec(tuple(Band(b, CHANNEL_GROUP) for b in widths if b))
                spent = sum(widths) // 2
                table[spent] = min(table.get(spent, math.inf), weight * expected_error(side, variance))
        tables.append(table)
    best = min(
        sum(table[spent] for table, spent in zip(tables, chosen, strict=True))
        for chosen in itertools.product(*tables)
        if sum(chosen) == units
    )
    assert error == pytest.approx(best, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.floats(0.5, 7.9), st.sampled_from([0, 1, 2]), st.integers(0, 2**31))
def test_size_of_the_whole_model_does_not_depend_on_the_data(
    count: int, target: float, outliers: int, seed: int
) -> None:
    generator = random.Random(seed)
    planned = [Profile(64, 48)] * count
    if not 2 * count <= round(target * 64 * 2 * count / 16) <= 4 * 14 * count:
        return

    def fitted(rank: int) -> list[float]:
        return sorted((generator.expovariate(0.1) ** 3 for _ in range(rank)), reverse=True)

    real = [
        Profile(64, 48, fitted(64), fitted(48), generator.expovariate(1), generator.expovariate(1))
        for _ in range(count)
    ]
    nominal, found = joint(target, planned, outliers=outliers), joint(target, real, outliers=outliers)
    assert sum(side.bytes_per_token for side in nominal) == sum(side.bytes_per_token for side in found)


def test_the_side_that_matters_gets_the_bits() -> None:
    falling = [0.9**c for c in range(64)]
    first, second = joint(4.0, [Profile(64, 64, falling, falling, k_weight=1e6, v_weight=1e-6)])
    assert first.code_bytes > 3 * second.code_bytes


def test_a_whole_model_budget_out_of_reach() -> None:
    with pytest.raises(ValueError, match=r"target_bits_per_channel 5.0 cannot be met with 64 of 128 channels"):
        joint(5.0, [Profile(32, 32)])
