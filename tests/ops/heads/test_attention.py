"""Compiled attention against float64 attention of the decoded cache, at every level of the machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.cases.heads import Cache, bands, exact, fill, random_cache, random_codec, relative_error, starts
from kvcompress.codec.bands import SideSpec
from kvcompress.ops.call import Call
from kvcompress.ops.heads.attention import bind
from kvcompress.ops.heads.cpu import CpuHeads

BAR = 1e-5
"""Relative error of the output. The products are exact to 24 bits, so this is float32's, not the codes'."""

MIXED_K = bands((8, 24), (4, 16), (2, 8))
MIXED_V = bands((8, 8), (4, 8), (2, 40))
SIDES = [
    (32, bands((16, 32)), bands((16, 32))),
    (32, bands((8, 32)), bands((4, 32))),
    (32, bands((2, 8)), bands((2, 8))),
    (64, bands((16, 24)), bands((8, 40))),
    (64, MIXED_K, MIXED_V),
    (64, bands((4, 8)), bands((16, 40))),
    (128, bands((8, 128)), bands((8, 128))),
    (128, bands((4, 128)), bands((4, 128))),
    (128, bands((2, 128)), bands((2, 128))),
    (128, bands((4, 72), (2, 24)), bands((8, 8), (4, 56), (2, 64))),
    (128, bands((16, 128)), bands((16, 88))),
    (64, bands((32, 64)), bands((32, 40))),
    (64, bands((4, 64), outliers=1), bands((4, 64), outliers=1)),
    (64, bands((8, 24), (4, 16), (2, 8), outliers=2), bands((8, 8), (4, 8), (2, 40), outliers=2)),
    (128, bands((4, 128), outliers=2), bands((16, 128))),
    (32, bands((32, 32)), bands((2, 8), outliers=1)),
    (256, bands((2, 256), outliers=1), bands((4, 256), outliers=2)),
]


def attend(
    cache: Cache, query_THD: Tensor, query_lens: list[int], split_tokens: int = CpuHeads.split_tokens
) -> tuple[Tensor, Tensor]:
    """By the CPU's kernels."""
    op = bind(cache.codec, "cpu")
    assert isinstance(op, CpuHeads)
    op.split_tokens = split_tokens
    return replace(cache, op=op).attend(query_THD, query_lens)


def random_query(tokens: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, heads, head_dim, generator=torch.Generator().manual_seed(9)).to(dtype)


def assert_exact(cache: Cache, query_THD: Tensor, query_lens: list[int], bar: float = BAR) -> None:
    output_THD, lse_TH = attend(cache, query_THD, query_lens)
    expected_THD, expected_TH = exact(cache, query_THD, starts(query_lens), query_THD.shape[2] ** -0.5)
    assert relative_error(output_THD, expected_THD) < bar
    torch.testing.assert_close(lse_TH.double(), expected_TH, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("head_dim", "k", "v"), SIDES)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_ragged_batch_of_prefill_and_decode(level: str, head_dim: int, k: SideSpec, v: SideSpec, group: int) -> None:
    cache = random_cache(random_codec(2, head_dim, k, v), [1, 15, 16, 17, 63, 64, 65, 150, 40])
    query_lens = [1, 1, 1, 1, 1, 2, 5, 33, 40]
    assert_exact(cache, random_query(sum(query_lens), 2 * group, head_dim), query_lens)


@pytest.mark.parametrize("block_size", [16, 48, 64, 128])
def test_block_sizes_and_boundaries(level: str, block_size: int) -> None:
    lengths = [block_size - 1, block_size, block_size + 1, 2 * block_size, 3 * block_size + 1]
    exact_v = bands(*MIXED_V.bands, outliers=2)
    cache = random_cache(random_codec(2, 64, bands(*MIXED_K.bands, outliers=1), exact_v), lengths, block_size)
    assert_exact(cache, random_query(len(lengths), 6, 64), [1] * len(lengths))


@pytest.mark.parametrize(("dtype", "bar"), [(torch.bfloat16, 3e-3), (torch.float16, 5e-4), (torch.float32, BAR)])
@pytest.mark.parametrize("bits", [32, 16, 8, 4, 2])
def test_query_dtypes(level: str, dtype: torch.dtype, bar: float, bits: int) -> None:
    cache = random_cache(random_codec(2, 64, bands((bits, 64)), bands((bits, 64))), [200, 31])
    assert_exact(cache, random_query(5, 8, 64, dtype), [3, 2], bar)


@pytest.mark.parametrize("group", [7, 64, 71])
def test_unusual_group_sizes(level: str, group: int) -> None:
    cache = random_cache(random_codec(1, 32, bands((4, 32)), bands((8, 24))), [70, 20])
    assert_exact(cache, random_query(4, group, 32), [1, 3])


def test_strided_queries_and_outputs(level: str) -> None:
    cache = random_cache(random_codec(2, 64, bands((8, 64)), bands((4, 64))), [90, 33])
    query_THD = random_query(4, 4, 64)
    wide_THD = torch.zeros(6, 8, 64)
    wide_THD[1:5, ::2] = query_THD
    expected_THD, _ = attend(cache, query_THD, [1, 3])
    output_THD = torch.zeros(4, 9, 64)
    batch = (cache.block_table_RN, torch.tensor([0, 1, 4]), torch.tensor(cache.seq_lens))
    call = Call(output_THD[:, 2:6], wide_THD[1:5, ::2], *batch, 0.125)
    bind(cache.codec, "cpu").attend(call, cache.pages_NHX)
    assert torch.equal(output_THD[:, 2:6], expected_THD)
    assert not output_THD[:, :2].any()
    assert not output_THD[:, 6:].any()


@pytest.mark.parametrize("side", [bands((16, 64)), bands((4, 64)), bands((4, 64), outliers=2)])
def test_results_depend_on_neither_threads_nor_batch(level: str, side: SideSpec) -> None:
    cache = random_cache(random_codec(2, 64, side, side), [700, 300, 129])
    query_lens = [1, 40, 1]
    query_THD = random_query(sum(query_lens), 8, 64)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(attend(cache, query_THD, query_lens, split_tokens=128)[0])
    assert all(torch.equal(result, results[0]) for result in results[1:])
    alone = replace(cache, block_table_RN=cache.block_table_RN[1:2], seq_lens=cache.seq_lens[1:2])
    last_THD = attend(alone, query_THD[40:41], [1], split_tokens=128)[0]
    torch.testing.assert_close(last_THD, results[0][40:41], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("split_tokens", [128, 512])
@pytest.mark.parametrize("v", [bands((16, 64)), bands((4, 64), outliers=2)])
def test_splits_agree(level: str, v: SideSpec, split_tokens: int) -> None:
    cache = random_cache(random_codec(2, 64, MIXED_K, v), [513, 64, 65])
    query_THD = random_query(4, 8, 64)
    whole_THD, whole_TH = attend(cache, query_THD, [2, 1, 1], split_tokens=4096)
    split_THD, split_TH = attend(cache, query_THD, [2, 1, 1], split_tokens=split_tokens)
    # The running maximum differs, and with it the rounding of score - maximum: 1e-6 for scores around 16.
    assert relative_error(split_THD, whole_THD.double()) < 2e-6
    torch.testing.assert_close(split_TH, whole_TH, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("bits", "outliers"), [(32, 0), (16, 0), (8, 0), (4, 0), (2, 0), (8, 1), (4, 1), (4, 2), (2, 2)]
)
@pytest.mark.parametrize("case", ["outlier channels", "constant tokens", "zeros", "huge", "dominant token", "sink"])
def test_adversarial_values(level: str, bits: int, outliers: int, case: str) -> None:
    generator = torch.Generator().manual_seed(3)
    keys_THD, values_THD = torch.randn(2, 180, 2, 64, generator=generator)
    query_THD = random_query(3, 8, 64)
    if case == "outlier channels":
        keys_THD[..., ::13] *= 100
        values_THD[..., 5] *= 100
    elif case == "constant tokens":
        keys_THD[:] = keys_THD[0]
        values_THD[:] = values_THD[0]
    elif case == "zeros":
        keys_THD[:], values_THD[:] = 0, 0
        query_THD[1] = 0
    elif case == "huge":
        keys_THD[:] = 6e4 * keys_THD.sign()
        values_THD[:] = 6e4 * values_THD.sign()
        query_THD *= 1e-4
    elif case == "dominant token":
        keys_THD[77] = 40 * query_THD[2, ::4]
    else:
        keys_THD[0, :, 3] = 500
        values_THD[0] *= 1e-3
    side = bands((bits, 64), outliers=outliers)
    cache = fill(random_codec(2, 64, side, side), [keys_THD], [values_THD])
    # Scores in the thousands carry float32's error into the exponent.
    bar = 1e-3 if case in ("outlier channels", "huge", "dominant token", "sink") else BAR
    output_THD, _ = attend(cache, query_THD, [3])
    expected_THD, _ = exact(cache, query_THD, [0, 3], 0.125)
    # Zeros are the mean plus its opposite: the mean is the size of what is added up.
    size = max(float(expected_THD.norm()), float(cache.codec.v.mean_HD.norm()))
    assert float((output_THD.double() - expected_THD).norm()) < bar * size


@pytest.mark.parametrize("side", [bands((16, 32)), bands((4, 32)), bands((4, 32), outliers=1)])
def test_a_query_that_is_not_finite_stays_visible(level: str, side: SideSpec) -> None:
    cache = random_cache(random_codec(1, 32, side, side), [70])
    query_THD = random_query(2, 2, 32)
    query_THD[0, 1, 5] = torch.nan
    output_THD, _ = attend(cache, query_THD, [2])
    assert output_THD[0, 1].isnan().all()
    assert output_THD[:, 0].isfinite().all()
    assert output_THD[1].isfinite().all()


def test_a_damaged_channel_number_changes_nothing_else(level: str) -> None:
    """Numbers beyond the kept channels are ignored: no write outside the sums."""
    side = bands((4, 32), outliers=2)
    cache = random_cache(random_codec(1, 64, side, side), [70])
    query_THD = random_query(2, 2, 64)
    first = int(cache.block_table_RN[0, 0])
    for place in (cache.layout.k, cache.layout.v):
        cache.pages_NHX[first, :, place.channel_offset : place.channel_offset + 2] = 200
        cache.pages_NHX[first, :, place.outlier_offset : place.outlier_offset + 4] = 0
    found_THD, _ = attend(cache, query_THD, [2])
    for place in (cache.layout.k, cache.layout.v):
        cache.pages_NHX[first, :, place.channel_offset : place.channel_offset + 2] = torch.tensor([0, 1]).byte()
    expected_THD, _ = attend(cache, query_THD, [2])
    assert torch.equal(found_THD, expected_THD)


def test_requests_without_queries_are_skipped(level: str) -> None:
    cache = random_cache(random_codec(1, 32, bands((4, 32)), bands((4, 32))), [20, 30, 40])
    query_THD = random_query(2, 2, 32)
    output_THD, _ = attend(cache, query_THD, [1, 0, 1])
    expected_THD, _ = exact(cache, query_THD, [0, 1, 1, 2], 32**-0.5)
    assert relative_error(output_THD, expected_THD) < BAR


@pytest.mark.usefixtures("compiled")
class TestRefusals:
    def cache(self) -> Cache:
        return random_cache(random_codec(1, 32, bands((4, 32)), bands((4, 32))), [40])

    def test_block_outside_the_cache(self) -> None:
        cache = self.cache()
        cache.block_table_RN[0, 1] = 10_000
        with pytest.raises(ValueError, match="outside the cache"):
            attend(cache, random_query(1, 2, 32), [1])

    def test_poisoned_entry_in_use(self) -> None:
        cache = self.cache()
        cache.block_table_RN[0, 1] = -1
        with pytest.raises(ValueError, match="outside the cache"):
            attend(cache, random_query(1, 2, 32), [1])

    def test_more_queries_than_tokens(self) -> None:
        cache = self.cache()
        with pytest.raises(ValueError, match="fewer tokens than queries"):
            attend(cache, random_query(41, 2, 32), [41])

    def test_length_beyond_the_block_table(self) -> None:
        cache = self.cache()
        cache.seq_lens = [16 * cache.block_table_RN.shape[1] + 1]
        with pytest.raises(ValueError, match="block table"):
            attend(cache, random_query(1, 2, 32), [1])

    def test_split_that_is_no_multiple_of_the_tile(self) -> None:
        with pytest.raises(ValueError, match="shape"):
            attend(self.cache(), random_query(1, 2, 32), [1], split_tokens=100)
