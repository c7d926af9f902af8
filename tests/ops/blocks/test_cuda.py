"""The CUDA kernels for blocks and rings, run warp by warp on the CPU, against float64 attention on decoded blocks."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases.blocks import Batch, batch_of, random_batch, random_codec
from benchmarks.cases.blocks_sides import BAR, SHAPES, cuda_sides, random_query
from benchmarks.cases.heads import POISON, relative_error
from kvcompress.codec.blocks.spec import BlockSide
from kvcompress.ops import gpu
from kvcompress.ops.blocks import cuda as cuda_blocks
from kvcompress.ops.blocks.attention import bind
from kvcompress.ops.blocks.cuda import CudaBlocks
from kvcompress.ops.blocks.reference import BlocksOp, newest
from kvcompress.ops.call import Call
from kvcompress.ops.interface.blocks import CUDA_WIDTHS
from tests.ops import emulated

Specs = tuple[BlockSide, BlockSide]


def numbers(*rows: list[int]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.int32) for row in rows]


def attend(
    kernels: ctypes.CDLL, batch: Batch, query_THD: Tensor, splits: int | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    codec = batch.op.plan.codec
    assert cuda_blocks.covers(codec.spec)
    batch = replace(batch, op=CudaBlocks(kernels, codec))
    return batch.attend(query_THD, scale, max_query_len=max(batch.query_lens), splits=splits)


def assert_exact(
    kernels: ctypes.CDLL, batch: Batch, query_THD: Tensor, splits: int | None = None, bar: float = BAR
) -> tuple[Tensor, Tensor]:
    output_THD, lse_TH = attend(kernels, batch, query_THD, splits)
    expected_THD, expected_TH = batch.exact(query_THD)
    assert relative_error(output_THD, expected_THD) < bar
    torch.testing.assert_close(lse_TH.double(), expected_TH, rtol=1e-4, atol=2e-3)
    return output_THD, lse_TH


@pytest.mark.parametrize(("head_dim", "specs"), SHAPES)
def test_every_instance(kernels: ctypes.CDLL, head_dim: int, specs: Specs) -> None:
    """Ragged lengths, NaN in all that was never written, table entries of -1, one query token or several."""
    batch = random_batch(random_codec(2, head_dim, specs), [1, 63, 64, 65, 330], [1, 1, 1, 1, 3])
    assert_exact(kernels, batch, random_query(7, 8, head_dim))


def test_every_listed_pair_of_widths_is_tried() -> None:
    assert {(k.bits, v.bits) for _, (k, v) in SHAPES} == set(CUDA_WIDTHS)


@pytest.mark.parametrize("group", [1, 7, 12])
def test_group_sizes_and_queries_across_blocks(kernels: ctypes.CDLL, group: int) -> None:
    """Rows of one tile see different blocks, and different tokens exactly."""
    batch = random_batch(random_codec(2, 64, cuda_sides(64, 4)), [130, 20, 195], [70, 20, 5])
    assert_exact(kernels, batch, random_query(95, 2 * group, 64))


@pytest.mark.parametrize("per_page", [1, 4])
def test_blocks_per_page(kernels: ctypes.CDLL, per_page: int) -> None:
    batch = random_batch(random_codec(1, 64, cuda_sides(64, 2)), [63, 700], [1, 4], per_page)
    assert_exact(kernels, batch, random_query(5, 4, 64))


def test_splits_agree(kernels: ctypes.CDLL) -> None:
    """Also with more splits than blocks."""
    batch = random_batch(random_codec(2, 64, cuda_sides(64, 4)), [900, 64, 1], [2, 1, 1])
    query_THD = random_query(4, 8, 64)
    whole_THD, whole_TH = assert_exact(kernels, batch, query_THD, 1)
    for splits in (2, 3, 20):
        split_THD, split_TH = assert_exact(kernels, batch, query_THD, splits)
        assert relative_error(split_THD, whole_THD.double()) < 5e-4
        torch.testing.assert_close(split_TH, whole_TH, rtol=1e-5, atol=1e-5)


def test_the_two_ways_of_copying_agree() -> None:
    libraries = [emulated.library(copies) for copies in emulated.COPIES]
    if None in libraries:
        pytest.skip("no C++ compiler to emulate the CUDA kernels with")
    batch = random_batch(random_codec(2, 64, cuda_sides(64, 4, v_bits=2)), [1100, 64], [1, 1])
    results = [attend(found, batch, random_query(2, 8, 64)) for found in libraries if found is not None]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_long_context_stays_exact(kernels: ctypes.CDLL) -> None:
    """Nearly uniform attention: sums of offsets are thousands of times the result."""
    batch = random_batch(random_codec(1, 64, cuda_sides(64, 4, v_bits=2)), [4100], [1])
    assert_exact(kernels, batch, 0.05 * random_query(1, 4, 64))


@pytest.mark.parametrize(("dtype", "bar"), [(torch.bfloat16, 4e-3), (torch.float16, 2e-3)])
def test_dtypes(kernels: ctypes.CDLL, dtype: torch.dtype, bar: float) -> None:
    """Of queries, keys, values, rings and output; the latter's rounding is the larger part of the error."""
    batch = random_batch(random_codec(2, 64, cuda_sides(64, 4)), [90, 31, 200], [3, 2, 1], dtype=dtype)
    assert_exact(kernels, batch, random_query(6, 8, 64, dtype), bar=bar)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(
    "case", ["outlier channels", "constant channels", "constant", "zeros", "huge", "tiny", "dominant token", "sink"]
)
def test_adversarial_values(kernels: ctypes.CDLL, bits: int, case: str) -> None:
    keys_THD, values_THD = torch.randn(2, 180, 2, 64, generator=torch.Generator().manual_seed(3))
    query_THD = random_query(3, 8, 64)
    if case == "outlier channels":
        keys_THD[..., ::13] *= 100
        values_THD[..., 5] *= 100
        query_THD *= 0.02  # scores of ordinary size: a half's rounding of larger ones is larger, whoever rounds
    elif case == "constant channels":
        keys_THD[..., ::7] = 30
        values_THD[..., ::5] = -20
        query_THD *= 0.05
    elif case == "constant":
        keys_THD[:], values_THD[:] = keys_THD[0].clone(), values_THD[0].clone()
    elif case == "zeros":
        keys_THD[:], values_THD[:] = 0, 0
        query_THD[1] = 0
    elif case == "huge":
        keys_THD[:] = 6e4 * keys_THD.sign()
        values_THD[:] = 6e4 * values_THD.sign()
        query_THD *= 1e-5
    elif case == "tiny":
        keys_THD *= 1e-7
        values_THD *= 1e-7
    elif case == "dominant token":
        keys_THD[77] = 40 * query_THD[2, ::4]
    else:
        keys_THD[0, :, 3] = 500
        values_THD[0] *= 1e-3
        query_THD *= 0.1
    batch = batch_of(random_codec(2, 64, cuda_sides(64, bits)), [(keys_THD, values_THD)], [3])
    output_THD, _ = attend(kernels, batch, query_THD)
    expected_THD, _ = batch.exact(query_THD)
    # Zeros are the mean plus its opposite: the mean is the size of what is added up.
    size = max(float(expected_THD.norm()), float(batch.op.plan.codec.v.mean_HD.norm()))
    assert float((output_THD.double() - expected_THD).norm()) < 3e-3 * size


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_queries_beyond_the_range_of_a_half(kernels: ctypes.CDLL, scale: float) -> None:
    batch = random_batch(random_codec(1, 64, cuda_sides(64, 4)), [100], [1])
    query_THD = random_query(1, 4, 64)
    output_THD, _ = attend(kernels, batch, scale * query_THD, scale=0.125 / scale)
    assert relative_error(output_THD, batch.exact(query_THD)[0]) < BAR


@pytest.mark.parametrize("length", [50, 70])
def test_a_query_that_is_not_finite_stays_visible(kernels: ctypes.CDLL, length: int) -> None:
    batch = random_batch(random_codec(1, 64, cuda_sides(64, 4)), [length], [2])
    query_THD = random_query(2, 2, 64)
    query_THD[0, 1, 5] = torch.nan
    output_THD, _ = attend(kernels, batch, query_THD, splits=2)
    assert output_THD[0, 1].isnan().all()
    assert output_THD[:, 0].isfinite().all()
    assert output_THD[1].isfinite().all()


def test_requests_without_queries_are_skipped(kernels: ctypes.CDLL) -> None:
    batch = random_batch(random_codec(1, 64, cuda_sides(64, 4)), [20, 130, 140], [1, 0, 1])
    assert_exact(kernels, batch, random_query(2, 2, 64))


@pytest.mark.parametrize("damaged", [1, 40])
def test_damaged_places_of_outliers_stay_inside(kernels: ctypes.CDLL, damaged: int) -> None:
    """Places that no entry has are read as the last entry's, and nothing beyond the matrix is written."""
    specs = cuda_sides(64, 4, v_rank=48)
    batch = random_batch(random_codec(1, 64, specs), [10 * 64 + 3], [1])
    ends = (specs[0].nbytes, specs[0].nbytes + specs[1].nbytes)
    for end, side in zip(ends, specs, strict=True):
        size = side.parts()["outlier_places"]
        if damaged > 1:  # several at one place count nothing, because only the torch code adds them up
            batch.pages_NHMB[..., end - 2 * size : end - size] = 0
        batch.pages_NHMB[..., end - 2 * damaged : end] = POISON
    assert_exact(kernels, batch, random_query(1, 2, 64))


def test_rows_side_by_side_and_not_aligned(kernels: ctypes.CDLL) -> None:
    batch = random_batch(random_codec(2, 64, cuda_sides(64, 4)), [90, 33], [1, 3], dtype=torch.bfloat16)
    query_THD = random_query(4, 4, 64, torch.bfloat16)
    expected_THD, _ = attend(kernels, batch, query_THD)
    one = torch.zeros(4, 1, 64, dtype=torch.bfloat16)
    # One projection's rows, and the same a few bytes later.
    for offset in (0, 3):
        flat = torch.zeros(4 * 9 * 64 + offset, dtype=torch.bfloat16)
        wide_THD = flat[offset:].view(4, 9, 64).copy_(torch.cat([query_THD, batch.newest(0), batch.newest(1), one], 1))
        output_THD = torch.full((4, 5, 64), torch.nan, dtype=torch.bfloat16)
        ring_R, starts_R, lengths_R = numbers(batch.ring_R, batch.query_starts, batch.seq_lens)
        table = (batch.block_table_RN, starts_R, lengths_R)
        call = Call(output_THD[:, :4], wide_THD[:, :4], *table, 0.125, max_query_len=3)
        rows = (wide_THD[:, 4:6], wide_THD[:, 6:8], batch.pages_NHMB, batch.rings_NHXPD, ring_R)
        CudaBlocks(kernels, batch.op.plan.codec).attend(call, *rows)
        assert torch.equal(output_THD[:, :4], expected_THD)
        assert output_THD[:, 4].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keep(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Requests with fewer tokens than places, as many, more, and none; padding behind them."""
    generator = torch.Generator().manual_seed(4)
    counts, places = [1, 5, 67, 0, 150], 67
    starts, lengths = [0, 1, 6, 73, 73, 223], [9, 70, 200, 4, 150]
    keys_THD, values_THD = torch.randn(2, 230, 4, 16, generator=generator).to(dtype)[:, :, 1:3]
    one, other = (torch.full((9, 3, 2, places, 16), torch.nan, dtype=dtype)[:, 1:] for _ in range(2))
    ring_R, starts_R, lengths_R = numbers([7, 0, 3, 1, 5], starts, lengths)
    codec = random_codec(2, 16, cuda_sides(16, 4))
    call = Call(keys_THD, keys_THD, torch.empty(5, 0, dtype=torch.int32), starts_R, lengths_R, 1.0)
    CudaBlocks(kernels, codec).keep(call, keys_THD, values_THD, one, ring_R)
    BlocksOp(codec).keep(call, keys_THD[:223], values_THD[:223], other, ring_R)
    assert int(one.isfinite().sum()) == 2 * 2 * 16 * sum(min(count, places) for count in counts)
    assert torch.equal(one.nan_to_num(9), other.nan_to_num(9))


@pytest.mark.parametrize(
    ("change", "per_page"),
    [
        ({}, 3),
        ({"rank": 24}, 1),
        ({"rank": 144}, 1),
        ({"low_rank": 3}, 1),
        ({"low_rank": 10}, 1),
        ({"group": 32}, 1),
        ({"block": 128}, 1),
        ({"bits": 8}, 1),
    ],
)
def test_what_the_kernels_refuse(kernels: ctypes.CDLL, change: dict[str, Any], per_page: int) -> None:
    """In Python, so that torch attends; and once more where it would do harm."""
    k, v = cuda_sides(64, 4)
    if "block" in change:
        k = replace(k, **change)
    codec = random_codec(1, 256, (k, replace(v, **change)))
    assert cuda_blocks.covers(codec.spec) == (not change)
    pages_NHMB = torch.zeros(1, 1, per_page, codec.spec.record_bytes, dtype=torch.uint8)
    call = Call(torch.zeros(1, 1, 256), torch.zeros(1, 1, 256), numbers([0])[0][None], *numbers([0, 1], [1]), 1.0)
    with pytest.raises(ValueError, match="shape"):
        CudaBlocks(kernels, codec).attend_blocks(call, torch.zeros(1, 1, k.rank), pages_NHMB)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tensors on the CPU count as a GPU's; the names of the kernels that are called."""
    emulated.count_as_gpu(monkeypatch)
    calls: list[str] = []
    for name in ("attend_blocks", "keep"):
        function = getattr(CudaBlocks, name)
        monkeypatch.setattr(CudaBlocks, name, lambda *args, f=function, n=name: (calls.append(n), f(*args))[1])
    return calls


@pytest.mark.usefixtures("on_device")
def test_who_works_on_a_layer() -> None:
    """The kernels where they know it, else torch or the CPU's kernels."""
    assert isinstance(bind(random_codec(1, 64, cuda_sides(64, 4)), "cpu"), CudaBlocks)
    assert not bind(random_codec(1, 64, cuda_sides(24, 4)), "cpu").on_kernels


@pytest.mark.parametrize("query_lens", [[1, 1], [3, 0], [gpu.MOST_QUERIES + 1, 1]])
@pytest.mark.parametrize("per_page", [2, 3])
def test_the_operation(on_device: list[str], query_lens: list[int], per_page: int) -> None:
    """Many queries are a prefill and go to torch, as do pages that the kernels do not cover."""
    batch = random_batch(random_codec(2, 64, cuda_sides(64, 4)), [150, 70], query_lens, per_page)
    query_THD = random_query(sum(query_lens), 4, 64)
    output_THD, _ = batch.attend(query_THD)
    assert relative_error(output_THD, batch.exact(query_THD)[0]) < BAR
    assert on_device == (["attend_blocks"] if max(query_lens) <= gpu.MOST_QUERIES and per_page == 2 else [])


def test_steps_one_after_the_other(on_device: list[str]) -> None:
    """What a step seals and keeps is what the next ones read."""
    generator = torch.Generator().manual_seed(6)
    codec = random_codec(2, 64, cuda_sides(64, 4))
    histories = [tuple(torch.randn(2, length, 2, 64, generator=generator)) for length in (140, 75)]
    whole = batch_of(codec, [(keys, values) for keys, values in histories], [1, 1])
    pages_NHMB = torch.full_like(whole.pages_NHMB, POISON)
    rings_NHXPD = torch.full_like(whole.rings_NHXPD, torch.nan)
    ring_R, at = numbers(whole.ring_R)[0], [0, 0]
    for counts in ([60, 75], [3, 0], [1, 0], [70, 0], [6, 0]):
        at = [done + count for done, count in zip(at, counts, strict=True)]
        seen = [(keys[:n], values[:n]) for (keys, values), n in zip(histories, at, strict=True)]
        step = replace(whole, pages_NHMB=pages_NHMB, rings_NHXPD=rings_NHXPD, histories=seen, query_lens=counts)
        query_THD = random_query(sum(counts), 4, 64)
        call, output_THD, _ = step.call(query_THD)
        step.op.seal(call, *step.tokens, pages_NHMB, rings_NHXPD, ring_R)
        step.op.attend(call, *step.tokens, pages_NHMB, rings_NHXPD, ring_R)
        assert relative_error(output_THD, step.exact(query_THD)[0]) < BAR
        step.op.keep(call, *step.tokens, rings_NHXPD, ring_R)
    assert on_device.count("keep") == 5
    assert "attend_blocks" in on_device


def test_nothing_is_read_from_the_device(on_device: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With numbers on a device, attention asks for none of them."""
    batch = random_batch(random_codec(1, 64, cuda_sides(64, 4)), [150], [1])
    query_THD, output_THD = random_query(1, 4, 64), torch.empty(1, 4, 64)
    ring_R, starts_R, lengths_R = numbers(batch.ring_R, batch.query_starts, batch.seq_lens)

    def refuse(*_: object) -> None:
        raise AssertionError("a number was read")

    for name in ("tolist", "item", "cpu", "__int__", "__bool__"):
        monkeypatch.setattr(Tensor, name, refuse)
    call = Call(output_THD, query_THD, batch.block_table_RN, starts_R, lengths_R, 0.125, max_query_len=1)
    batch.op.attend(call, *batch.tokens, batch.pages_NHMB, batch.rings_NHXPD, ring_R)
    assert on_device == ["attend_blocks"]


def test_the_reference_reads_the_ring_by_its_number() -> None:
    rings_NHXPD = torch.randn(3, 2, 2, 67, 8)
    own = torch.randn(4, 2, 8)
    (keys, values), start = newest(rings_NHXPD, torch.tensor([2]), own, own, 70, 64)
    assert start == 64
    assert torch.equal(keys, torch.cat([rings_NHXPD[2, :, 0, [64, 65]].transpose(0, 1), own]))
    assert torch.equal(values[:2], rings_NHXPD[2, :, 1, [64, 65]].transpose(0, 1))
