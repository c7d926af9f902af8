"""Simulated peers' quantizers, each against the definition written out value by value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from quality.hadamard import hadamard, rotated
from quality.integers import fp8_e4m3, group_size, min_max, q4_0, q8_0
from quality.kivi import kivi
from quality.oscar import oscar
from quality.turboquant import gaussian_codebook, turboquant
from torch import Tensor


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group", [32, 64])
def test_min_max_by_the_letter(bits: int, group: int) -> None:
    x = states(5, 64)
    found = min_max(x, bits, group)
    for row, coded in zip(x.numpy(), found.numpy(), strict=True):
        for start in range(0, 64, group):
            part = row[start : start + group]
            scale = float(np.float16((part.max() - part.min()) / (2**bits - 1)))
            zero = float(np.float16(part.min()))
            for value, got in zip(part, coded[start : start + group], strict=True):
                code = min(max(round((float(value) - zero) / scale), 0), 2**bits - 1)
                assert got == pytest.approx(code * scale + zero, abs=1e-4)


def test_min_max_keeps_what_has_no_spread() -> None:
    x = torch.tensor([[0.0] * 8, [1.5] * 8])
    torch.testing.assert_close(min_max(x, 4, 8), x)


@pytest.mark.parametrize(("quantize", "low", "high"), [(q4_0, -8, 7), (q8_0, -127, 127)])
def test_blocks_of_32_by_the_letter(quantize: object, low: int, high: int) -> None:
    x = states(3, 96)
    found = quantize(x)  # type: ignore[operator]
    for row, coded in zip(x.tolist(), found.tolist(), strict=True):
        for start in range(0, 96, 32):
            part = row[start : start + 32]
            largest = max(part, key=abs)
            scale = largest / -8 if low == -8 else abs(largest) / 127
            stored = float(np.float16(scale))
            for value, got in zip(part, coded[start : start + 32], strict=True):
                nearest = min(range(low, high + 1), key=lambda code: abs(code - value / scale))
                assert got == pytest.approx(nearest * stored, rel=1e-5, abs=1e-6)


def test_blocks_of_zeros_stay_zero() -> None:
    zeros = torch.zeros(2, 32)
    assert torch.equal(q4_0(zeros), zeros)
    assert torch.equal(q8_0(zeros), zeros)


def test_fp8_saturates() -> None:
    assert fp8_e4m3(torch.tensor([1e4, -1e4, 1.0, 1.0624])).tolist() == [448.0, -448.0, 1.0, 1.0]


@pytest.mark.parametrize(("channels", "wanted", "size"), [(64, 32, 32), (64, 128, 64), (80, 32, 16), (256, 128, 128)])
def test_groups_divide_a_row(channels: int, wanted: int, size: int) -> None:
    assert group_size(channels, wanted) == size


@pytest.mark.parametrize(("size", "block"), [(64, 64), (96, 32), (80, 16), (8, 8)])
def test_hadamard_is_orthonormal_in_blocks(size: int, block: int) -> None:
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(size), atol=1e-5, rtol=0)
    expected = torch.block_diag(*[torch.ones(block, block)] * (size // block)) / math.sqrt(block)
    torch.testing.assert_close(matrix.abs(), expected)
    x = states(3, size)
    torch.testing.assert_close(rotated(rotated(x, matrix), matrix.mT), x)


@pytest.mark.parametrize(("bits", "squared_error"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_gaussian_codebook_has_the_error_of_max_1960(bits: int, squared_error: float) -> None:
    book = gaussian_codebook(bits)
    assert torch.equal(book, book.sort().values)
    torch.testing.assert_close(book, -book.flip(0), atol=1e-5, rtol=0)
    grid = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    nearest = (grid[:, None] - book.double()).square().amin(1)
    assert torch.trapezoid(nearest * density, grid).item() == pytest.approx(squared_error, rel=2e-3)


def test_turboquant_by_the_letter() -> None:
    x, bits, size = states(4, 64), 3, 64
    found = turboquant(x, bits)
    book, matrix = gaussian_codebook(bits), hadamard(size)
    for row, coded in zip(x, found, strict=True):
        turned = matrix @ row
        norm = float(np.float16(turned.norm()))
        codes = [min(book.tolist(), key=lambda code, v=v: abs(code - v / norm * 8)) for v in turned.tolist()]
        direction = torch.tensor(codes) / torch.tensor(codes).norm()
        torch.testing.assert_close(coded, matrix.mT @ (direction * norm), atol=1e-4, rtol=1e-4)


def test_kivi_codes_keys_by_channel_and_values_by_token() -> None:
    x = states(1, 2, 70, 32)
    peer = kivi(2)
    keys, values = peer.stored(x, "k", 0), peer.stored(x, "v", 0)
    for head in range(2):
        for start in (0, 32):
            for channel in range(32):
                part = x[0, head, start : start + 32, channel]
                torch.testing.assert_close(keys[0, head, start : start + 32, channel], min_max(part[None], 2, 32)[0])
        torch.testing.assert_close(values[0, head, 5], min_max(x[0, head, 5][None], 2, 32)[0])
    torch.testing.assert_close(keys[:, :, 64:], x[:, :, 64:])


def test_oscar_clips_in_rotated_coordinates() -> None:
    x = states(1, 1, 6, 64)
    rotation, _ = torch.linalg.qr(states(64, 64, seed=1))
    peer = oscar({"k": {3: rotation[None]}, "v": {3: rotation[None]}})
    for side, share in (("k", 0.96), ("v", 0.92)):
        found = peer.stored(x, side, 3)  # type: ignore[arg-type]
        for token in range(6):
            turned = x[0, 0, token] @ rotation
            limit = np.quantile(turned.abs().numpy(), share)
            coded = min_max(turned.clamp(-limit, limit)[None], 2, 64)[0]
            torch.testing.assert_close(found[0, 0, token], rotation @ coded, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [64, 320, 4096])
def test_exact_windows_count_as_16_bits(length: int) -> None:
    rotation = {"k": {0: torch.eye(64)[None]}, "v": {0: torch.eye(64)[None]}}
    exact = min(length, 320)
    expected = (16 * exact + 2.5 * (length - exact)) / length
    assert oscar(rotation).bits(64, length) == pytest.approx(expected)  # type: ignore[arg-type]
    wide = (16 * exact + 2.25 * (length - exact)) / length
    assert oscar(rotation).bits(128, length) == pytest.approx(wide)  # type: ignore[arg-type]


def test_kivi_counts_its_residual() -> None:
    # Of 1,024 tokens, 64.5 keys (from 1 to 128 as the residual fills) and 129 values are exact, the rest in 2 + 1 bits.
    keys, values = 16 * 64.5 + 3 * (1024 - 64.5), 16 * 129 + 3 * (1024 - 129)
    assert kivi(2).bits(64, 1024) == pytest.approx((keys + values) / 2 / 1024)
    assert kivi(2).bits(64, 100) > kivi(2).bits(64, 1000) > 3
