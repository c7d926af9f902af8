from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompress.codec.spec import CHANNEL_GROUP, EXPECTED_ERROR, Band, SideSpec
from kvcompress.methods.scalar import ScalarConfig, side_spec


def spec(rank: int = 64, head_dim: int = 64, variance: list[float] | None = None, **parameters: Any) -> SideSpec:
    config = ScalarConfig.model_validate({"method": "scalar", **parameters})
    return side_spec(config, "k", rank, head_dim, variance)


def test_bits_and_bands() -> None:
    assert spec(48, bits={"k": 4, "v": 2}).bands == (Band(4, 48),)
    assert spec(bits=16).bands == (Band(16, 64),)
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
    ],
)
def test_bad_parameters(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        spec(**parameters)
