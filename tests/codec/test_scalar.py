from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompress.codec import scalar
from kvcompress.codec.bands import Band, SideSpec
from kvcompress.codec.codes.registry import CODES

ONE_WIDTH = {bits: SideSpec((Band(bits, 64),)) for bits in (32, 16, 8, 4, 2)}
BANDED = SideSpec((Band(8, 16), Band(4, 24), Band(2, 16)))


def round_trip(latent: Tensor, side: SideSpec, weight: Tensor | None = None) -> Tensor:
    weight = torch.ones(latent.shape[1:]) if weight is None else weight
    return scalar.decode(scalar.encode(latent, weight, side), side)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_gaussian_error_is_what_theory_says(bits: int) -> None:
    latent = torch.randn(4000, 2, 64, generator=torch.Generator().manual_seed(0))
    error = (round_trip(latent, ONE_WIDTH[bits]) - latent).square().mean().item()
    # The gain adapts to each token, so the error may be a little below the fixed-gain optimum, never much above.
    assert 0.4 * CODES[bits].expected_error < error < 1.02 * CODES[bits].expected_error


def test_sixteen_bits_are_halves() -> None:
    latent = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_trip(latent, ONE_WIDTH[16]), latent.half().float())


def test_thirty_two_bits_are_exact() -> None:
    latent = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(0)) * 1e6
    assert torch.equal(round_trip(latent, ONE_WIDTH[32]), latent)


def test_code_bytes_are_little_endian_by_channel() -> None:
    """The documented packing, spelt out: channel c of b bits sits in byte c*b//8 at bit c*b%8."""
    latent = torch.randn(5, 2, BANDED.rank, generator=torch.Generator().manual_seed(1))
    encoded = scalar.encode(latent, torch.ones(2, BANDED.rank), BANDED)
    gain_TH, codes_THB = encoded.gain_TH, encoded.codes_THB
    assert gain_TH is not None
    decoded = scalar.decode(encoded, BANDED)
    for token, head in itertools.product(range(5), range(2)):
        offset, channel = 0, 0
        for band in BANDED.bands:
            for c in range(band.width):
                byte = int(codes_THB[token, head, offset + c * band.bits // 8])
                code = byte >> (c * band.bits % 8) & (2**band.bits - 1)
                value = (code - (2**band.bits - 1) / 2) * band.code.step * float(gain_TH[token, head])
                assert decoded[token, head, channel].item() == pytest.approx(value, rel=1e-6)
                channel += 1
            offset += band.bits * band.width // 8


def at_gain(latent: Tensor, gain: Tensor, bits: int) -> Tensor:
    """Plain quantization at a given gain."""
    top, step = 2**bits - 1, CODES[bits].step
    code = (latent / gain / step + top / 2).round().clamp(0, top)
    return (code - top / 2) * step * gain


@pytest.mark.parametrize(("bits", "share"), [(8, 0.05), (4, 0.9), (2, 0.99)])
def test_gain_accounts_for_clipping(bits: int, share: float) -> None:
    """Attention sinks: two channels x100. A gain from the root mean square alone clips them; ours must lose less."""
    latent = torch.randn(200, 2, 64, generator=torch.Generator().manual_seed(2))
    latent[:, :, [0, 5]] *= 100
    rms = latent.square().mean(-1, keepdim=True).sqrt()
    ours = (round_trip(latent, ONE_WIDTH[bits]) - latent).square().sum(-1)
    plain = (at_gain(latent, rms, bits) - latent).square().sum(-1)
    assert (ours <= plain * 1.001).all()
    assert ours.sum() < share * plain.sum()


@pytest.mark.parametrize("side", [*ONE_WIDTH.values(), BANDED, SideSpec(BANDED.bands, 2)])
@pytest.mark.parametrize("fill", [0.0, 1e-30, 1e30, float("inf"), float("nan")])
def test_extreme_input_decodes_to_finite_values(side: SideSpec, fill: float) -> None:
    assert torch.isfinite(round_trip(torch.full((2, 1, side.rank), fill), side)).all()


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([8, 4, 2]), st.integers(0, 2**31))
def test_encoding_decoded_values_again_is_stable(bits: int, seed: int) -> None:
    """Codes survive a round trip, so re-encoding (prefix recompute, migration) does not drift."""
    latent = torch.randn(64, 2, 64, generator=torch.Generator().manual_seed(seed)) * 3
    once = round_trip(latent, ONE_WIDTH[bits])
    twice = round_trip(once, ONE_WIDTH[bits])
    assert (twice - once).norm() <= 0.1 * (once - latent).norm() + 1e-3 * once.norm()


def test_tokens_are_independent() -> None:
    latent = torch.randn(9, 2, 64, generator=torch.Generator().manual_seed(3))
    weight = torch.ones(2, 64)
    side = SideSpec((Band(4, 64),), 2)
    parts = scalar.encode(latent, weight, side).to_parts()
    for token in range(9):
        alone = scalar.encode(latent[token : token + 1], weight, side).to_parts()
        for one, all_tokens in zip(alone, parts, strict=True):
            assert one is not None
            assert all_tokens is not None
            assert torch.equal(one[0], all_tokens[token])


@pytest.mark.parametrize("outliers", [1, 2])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_extreme_channels_are_stored_exactly(bits: int, outliers: int) -> None:
    """As many extreme channels as there are outliers: they come back to a half's rounding, the rest as before."""
    latent = torch.randn(200, 2, 64, generator=torch.Generator().manual_seed(4))
    extreme = [5, 60][:outliers]
    ordinary = [channel for channel in range(64) if channel not in extreme]
    latent[..., extreme] = 100 * latent[..., extreme].sign()
    decoded = round_trip(latent, SideSpec((Band(bits, 64),), outliers))
    # What the code leaves of 100 is stored, and lies between 64 and 128, where halves are 1/16 apart.
    assert (decoded - latent)[..., extreme].abs().max() <= 1 / 32 + 1e-4
    error = (decoded - latent)[..., ordinary].square().mean()
    assert error < 1.05 * CODES[bits].expected_error


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from([BANDED.bands, *(ONE_WIDTH[bits].bands for bits in (8, 4, 2))]),
    st.integers(0, 2**31),
    st.floats(1, 1000),
)
def test_an_outlier_never_hurts(bands: tuple[Band, ...], seed: int, factor: float) -> None:
    """More exact channels leave less weighted squared error, up to where the grid of gains happens to lie."""
    generator = torch.Generator().manual_seed(seed)
    rank = sum(band.width for band in bands)
    latent, weight = torch.randn(40, 2, rank, generator=generator), torch.rand(2, rank, generator=generator) + 0.01
    latent[:20, :, torch.randint(rank, (3,), generator=generator)] *= factor
    errors = [
        float((weight * (round_trip(latent, SideSpec(bands, outliers), weight) - latent).square()).sum())
        for outliers in (0, 1, 2)
    ]
    assert errors[1] <= errors[0]
    assert errors[2] <= errors[1]


def test_which_tokens_clip() -> None:
    """Token 0 is at home in its codes; token 1 has one channel far beyond what its others leave room for."""
    latent = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(5)).clamp(-2, 2)
    latent[1, 0, 9] = 30.0
    weight = torch.ones(1, 64)
    weight[:, 9] = 0.02  # else the gain would be chosen for this channel
    for outliers, expected in ((0, [False, True]), (1, [False, False])):
        side = SideSpec((Band(4, 64),), outliers)
        found = scalar.clips(scalar.encode(latent, weight, side), latent, weight, side)
        assert found[:, 0].tolist() == expected
    floats = ONE_WIDTH[16]
    assert not scalar.clips(scalar.encode(latent, weight, floats), latent, weight, floats).any()


def test_outliers_are_distinct_channels_even_of_a_token_of_zeros() -> None:
    encoded = scalar.encode(torch.zeros(3, 1, 16), torch.ones(1, 16), SideSpec((Band(4, 16),), 2))
    assert encoded.channel_THN is not None
    assert (encoded.channel_THN[..., 0] != encoded.channel_THN[..., 1]).all()
