"""Compiled attention on blocks and rings against float64 attention of the decoded cache, at every level."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.cases.blocks import Batch, batch_of, random_batch, random_codec, sides
from benchmarks.cases.heads import POISON, relative_error
from kvcompress.codec.blocks.spec import BlockSide
from kvcompress.ops.blocks.attention import bind
from kvcompress.ops.blocks.cpu import CpuBlocks
from kvcompress.ops.blocks.reference import BlocksOp
from kvcompress.ops.call import Call

BAR = 1e-5
"""Relative error of the output: float32's, not the codes'."""

SHAPES = [
    (32, sides()),
    (32, sides(bits=2, v_rank=24, group=16)),
    (32, sides(bits=8, rank=24, v_rank=8, low_rank=0, outliers=0)),
    (32, sides(bits=2, rank=8, v_rank=16, low_rank=1)),
    (64, sides(64, 4, block=64, group=64, low_rank=4, outliers=88)),
    (64, sides(64, 2, block=64, group=16, low_rank=3)),
    (64, sides(40, 4, block=48, group=16, v_rank=56)),
    (64, sides(64, 8, block=128, group=32, outliers=160)),
    (64, sides(48, 4, block=16, group=24)),
    (64, sides(64, 4, block=80, group=80, low_rank=2, outliers=40)),
    (128, sides(128, 4, block=64, group=64, outliers=168)),
    (128, sides(128, 2, block=64, group=64, outliers=168)),
    (256, sides(256, 2, block=32, group=8, low_rank=5)),
]


def random_query(tokens: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, heads, head_dim, generator=torch.Generator().manual_seed(9)).to(dtype)


def attend(batch: Batch, query_THD: Tensor, split_tokens: int) -> tuple[Tensor, Tensor]:
    assert isinstance(batch.op, CpuBlocks)
    batch.op.split_tokens = split_tokens
    return batch.attend(query_THD)


def assert_exact(batch: Batch, query_THD: Tensor, bar: float = BAR) -> None:
    output_THD, lse_TH = batch.attend(query_THD)
    expected_THD, expected_TH = batch.exact(query_THD)
    assert relative_error(output_THD, expected_THD) < bar
    torch.testing.assert_close(lse_TH.double(), expected_TH, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("head_dim", "specs"), SHAPES)
@pytest.mark.parametrize("group", [1, 4])
def test_ragged_batch_of_prefill_and_decode(
    level: str, head_dim: int, specs: tuple[BlockSide, BlockSide], group: int
) -> None:
    block = specs[0].block
    codec = random_codec(2, head_dim, specs)
    assert isinstance(bind(codec, "cpu"), CpuBlocks)
    seq_lens = [1, block - 1, block, block + 1, 3 * block - 1, 2 * block, 150, 3 * block + 5]
    query_lens = [1, 1, 1, 1, block + 3, 2 * block, 33, 2]
    batch = random_batch(codec, seq_lens, query_lens)
    assert_exact(batch, random_query(sum(query_lens), 2 * group, head_dim))


@pytest.mark.parametrize("per_page", [1, 3, 4])
def test_blocks_per_page(level: str, per_page: int) -> None:
    batch = random_batch(random_codec(2, 32, sides()), [31, 32, 100, 320], [1, 1, 4, 1], per_page)
    assert_exact(batch, random_query(7, 6, 32))


@pytest.mark.parametrize(("dtype", "bar"), [(torch.bfloat16, 3e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_dtypes(level: str, dtype: torch.dtype, bar: float, bits: int) -> None:
    batch = random_batch(random_codec(2, 64, sides(64, bits)), [90, 31, 200], [3, 2, 1], dtype=dtype)
    assert_exact(batch, random_query(6, 8, 64, dtype), bar)


@pytest.mark.parametrize("group", [7, 64, 71])
def test_unusual_group_sizes(level: str, group: int) -> None:
    assert_exact(random_batch(random_codec(1, 32, sides()), [70, 20], [1, 3]), random_query(4, group, 32))


@pytest.mark.parametrize("bits", [2, 4])
def test_results_depend_on_neither_threads_nor_batch(level: str, bits: int) -> None:
    batch = random_batch(random_codec(2, 64, sides(64, bits)), [700, 300, 129], [1, 40, 1])
    query_THD = random_query(42, 8, 64)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(attend(batch, query_THD, 128)[0])
    assert all(torch.equal(result, results[0]) for result in results[1:])
    alone = replace(batch, ring_R=batch.ring_R[2:], block_table_RN=batch.block_table_RN[2:])
    alone.histories, alone.query_lens = batch.histories[2:], [1]
    assert torch.equal(attend(alone, query_THD[41:], 128)[0], results[0][41:])


@pytest.mark.parametrize("split_tokens", [1, 100, 128])
def test_splits_agree(level: str, split_tokens: int) -> None:
    batch = random_batch(random_codec(2, 64, sides(64)), [513, 64, 65, 31], [2, 1, 1, 5])
    query_THD = random_query(9, 8, 64)
    whole_THD, whole_TH = attend(batch, query_THD, 4096)
    split_THD, split_TH = attend(batch, query_THD, split_tokens)
    assert relative_error(split_THD, whole_THD.double()) < 2e-6
    torch.testing.assert_close(split_TH, whole_TH, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(
    "case", ["outlier channels", "constant channels", "constant", "zeros", "huge", "tiny", "dominant token", "sink"]
)
def test_adversarial_values(level: str, bits: int, case: str) -> None:
    keys_THD, values_THD = torch.randn(2, 180, 2, 64, generator=torch.Generator().manual_seed(3))
    query_THD = random_query(3, 8, 64)
    if case == "outlier channels":
        keys_THD[..., ::13] *= 100
        values_THD[..., 5] *= 100
    elif case == "constant channels":
        keys_THD[..., ::7] = 30
        values_THD[..., ::5] = -20
    elif case == "constant":
        keys_THD[:], values_THD[:] = keys_THD[0].clone(), values_THD[0].clone()
    elif case == "zeros":
        keys_THD[:], values_THD[:] = 0, 0
        query_THD[1] = 0
    elif case == "huge":
        keys_THD[:] = 6e4 * keys_THD.sign()
        values_THD[:] = 6e4 * values_THD.sign()
        query_THD *= 1e-4
    elif case == "tiny":
        keys_THD *= 1e-7
        values_THD *= 1e-7
    elif case == "dominant token":
        keys_THD[77] = 40 * query_THD[2, ::4]
    else:
        keys_THD[0, :, 3] = 500
        values_THD[0] *= 1e-3
    batch = batch_of(random_codec(2, 64, sides(64, bits)), [(keys_THD, values_THD)], [3])
    # Scores in the thousands carry float32's error into the exponent.
    bar = 1e-3 if case in ("outlier channels", "huge", "dominant token", "sink") else 2e-5
    output_THD, _ = batch.attend(query_THD)
    expected_THD, _ = batch.exact(query_THD)
    # Zeros are the mean plus its opposite: the mean is the size of what is added up.
    size = max(float(expected_THD.norm()), float(batch.op.plan.codec.v.mean_HD.norm()))
    assert float((output_THD.double() - expected_THD).norm()) < bar * size


def test_a_query_that_is_not_finite_stays_visible(level: str) -> None:
    batch = random_batch(random_codec(1, 32, sides()), [70], [2])
    query_THD = random_query(2, 2, 32)
    query_THD[0, 1, 5] = torch.nan
    output_THD, _ = batch.attend(query_THD)
    assert output_THD[0, 1].isnan().all()
    assert output_THD[:, 0].isfinite().all()
    assert output_THD[1].isfinite().all()


@pytest.mark.parametrize("block", [32, 128])
def test_damaged_places_of_outliers_stay_inside(level: str, block: int) -> None:
    """Places that no entry has are read as the last entry's; nothing beyond the sums is written."""
    specs = sides(24, 4, block=block)
    batch = random_batch(random_codec(1, 32, specs), [2 * block + 3], [1])
    query_THD = random_query(1, 2, 32)
    k_bytes, size = specs[0].nbytes, specs[0].parts()["outlier_places"]
    for end in (k_bytes, k_bytes + specs[1].nbytes):
        batch.pages_NHMB[:, :, :, end - size : end] = POISON
    assert_exact(batch, query_THD)


def test_requests_without_queries_are_skipped(level: str) -> None:
    batch = random_batch(random_codec(1, 32, sides()), [20, 30, 40], [1, 0, 1])
    assert_exact(batch, random_query(2, 2, 32))


def test_strided_queries_keys_outputs_and_numbers(level: str) -> None:
    batch = random_batch(random_codec(2, 32, sides()), [90, 33], [1, 3])
    query_THD = random_query(4, 4, 32)
    expected_THD, _ = batch.attend(query_THD)
    # One projection's rows: queries, keys and values side by side.
    wide_THD = torch.cat([query_THD, batch.newest(0), batch.newest(1)], dim=1)
    output_THD = torch.zeros(4, 9, 32)

    def column(numbers: list[int]) -> Tensor:
        found = torch.tensor([[number, -1] for number in numbers], dtype=torch.int32)[:, 0]
        assert not found.is_contiguous()
        return found

    numbers = (batch.block_table_RN, column(batch.query_starts), column(batch.seq_lens))
    call = Call(output_THD[:, 2:6], wide_THD[:, :4], *numbers, 32**-0.5)
    caches = (batch.pages_NHMB, batch.rings_NHXPD, column(batch.ring_R))
    batch.op.attend(call, wide_THD[:, 4:6], wide_THD[:, 6:], *caches)
    assert torch.equal(output_THD[:, 2:6], expected_THD)
    assert not output_THD[:, :2].any()
    assert not output_THD[:, 6:].any()


@pytest.mark.usefixtures("without_library")
@pytest.mark.parametrize(("head_dim", "specs"), SHAPES[:2])
def test_attention_without_the_library(head_dim: int, specs: tuple[BlockSide, BlockSide]) -> None:
    batch = random_batch(random_codec(2, head_dim, specs), [100, 9, 64], [3, 1, 40])
    assert_exact(batch, random_query(44, 6, head_dim))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    "specs",
    [
        (sides()[0], BlockSide(32, 32, 4, "tokens", 32, 2, 2, 16)),
        (BlockSide(32, 32, 4, "channels", 16, 2, 2, 16), sides()[1]),
        (BlockSide(32, 32, 4, "tokens", 8, 2, 2, 16), sides()[1]),
        (sides()[0], BlockSide(32, 32, 4, "channels", 4, 2, 2, 16)),
    ],
)
def test_a_shape_the_kernels_do_not_cover_goes_to_the_reference(specs: tuple[BlockSide, BlockSide]) -> None:
    codec = random_codec(2, 32, specs)
    assert type(bind(codec, "cpu")) is BlocksOp
    assert_exact(random_batch(codec, [70], [2]), random_query(2, 4, 32))


@pytest.mark.usefixtures("compiled")
class TestRefusals:
    def batch(self) -> Batch:
        return random_batch(random_codec(1, 32, sides()), [40], [1])

    @pytest.mark.parametrize("page", [-1, 10_000])
    def test_page_outside_the_cache(self, page: int) -> None:
        batch = self.batch()
        batch.block_table_RN[0, 0] = page
        with pytest.raises(ValueError, match="outside the cache"):
            batch.attend(random_query(1, 2, 32))

    @pytest.mark.parametrize("ring", [-1, 3])
    def test_ring_outside_the_cache(self, ring: int) -> None:
        batch = self.batch()
        batch.ring_R = [ring]
        with pytest.raises(ValueError, match="ring"):
            batch.attend(random_query(1, 2, 32))

    def test_length_beyond_the_block_table(self) -> None:
        batch = self.batch()
        batch.block_table_RN = batch.block_table_RN[:, :0]
        with pytest.raises(ValueError, match="block table"):
            batch.attend(random_query(1, 2, 32))
