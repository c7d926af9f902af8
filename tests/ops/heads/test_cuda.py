"""The CUDA kernels' own source, run warp by warp on the CPU, against float64 attention of the decoded cache."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from benchmarks.cases import golden
from benchmarks.cases.heads import POISON, Cache, bands, exact, fill, random_cache, random_codec, relative_error, starts
from benchmarks.cases.heads_sides import MIXED_K, MIXED_V, SIDES, bar
from kvcompress.codec.bands import SideSpec
from kvcompress.codec.heads import fragment, pages
from kvcompress.codec.heads.layout import PageLayout
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.codec.layout import FRAGMENT
from kvcompress.ops import gpu
from kvcompress.ops.heads import cuda
from kvcompress.ops.heads.cuda import CudaHeads
from tests.golden import pages as committed
from tests.ops import emulated


def random_query(tokens: int, heads: int, head_dim: int) -> Tensor:
    return torch.randn(tokens, heads, head_dim, generator=torch.Generator().manual_seed(9))


def assert_exact(
    kernels: ctypes.CDLL, cache: Cache, query_THD: Tensor, query_lens: list[int], splits: int = 1
) -> tuple[Tensor, Tensor]:
    output_THD, lse_TH = emulated.attend(kernels, cache, query_THD, query_lens, splits)
    expected_THD, expected_TH = exact(cache, query_THD, starts(query_lens), query_THD.shape[2] ** -0.5)
    assert relative_error(output_THD, expected_THD) < bar(cache.codec.k.spec, cache.codec.v.spec)
    torch.testing.assert_close(lse_TH.double(), expected_TH, rtol=1e-4, atol=2e-3)
    return output_THD, lse_TH


@pytest.mark.parametrize(("head_dim", "k", "v"), SIDES)
def test_every_instance(kernels: ctypes.CDLL, head_dim: int, k: SideSpec, v: SideSpec) -> None:
    """Ragged lengths, NaN in everything that was never written, table entries of -1, one query token or several."""
    cache = random_cache(random_codec(2, head_dim, k, v), [1, 63, 64, 65, 330], 64)
    assert_exact(kernels, cache, random_query(7, 8, head_dim), [1, 1, 1, 1, 3])


@pytest.mark.parametrize("group", [1, 2, 7, 8, 12])
def test_group_sizes(kernels: ctypes.CDLL, group: int) -> None:
    cache = random_cache(random_codec(2, 64, bands((4, 64)), bands((4, 64))), [70, 20], 64)
    assert_exact(kernels, cache, random_query(4, 2 * group, 64), [1, 3])


@pytest.mark.parametrize("block_size", [64, 128, 256])
def test_block_sizes(kernels: ctypes.CDLL, block_size: int) -> None:
    lengths = [block_size - 1, block_size, block_size + 1, 2 * block_size + 70]
    for sides in [(bands((4, 64)), bands((2, 64))), (MIXED_K, MIXED_V)]:
        cache = random_cache(random_codec(2, 64, *sides), lengths, block_size)
        assert_exact(kernels, cache, random_query(4, 8, 64), [1] * 4)


@pytest.mark.parametrize(("k", "v"), [(bands((4, 64)), bands((4, 64))), (MIXED_K, bands(*MIXED_V.bands, outliers=1))])
def test_splits_agree(kernels: ctypes.CDLL, k: SideSpec, v: SideSpec) -> None:
    """Also with more splits than chunks."""
    cache = random_cache(random_codec(2, 64, k, v), [700, 64, 1], 64)
    query_THD = random_query(4, 8, 64)
    whole_THD, whole_TH = assert_exact(kernels, cache, query_THD, [2, 1, 1])
    for splits in (2, 3, 16):
        split_THD, split_TH = assert_exact(kernels, cache, query_THD, [2, 1, 1], splits)
        assert relative_error(split_THD, whole_THD.double()) < 5e-4
        torch.testing.assert_close(split_TH, whole_TH, rtol=1e-5, atol=1e-5)


def test_the_two_ways_of_copying_agree() -> None:
    libraries = [emulated.library(copies) for copies in emulated.COPIES]
    if None in libraries:
        pytest.skip("no C++ compiler to emulate the CUDA kernels with")
    cache = random_cache(random_codec(2, 64, bands((8, 64)), bands((4, 64))), [1100, 64], 64)
    query_THD = random_query(2, 8, 64)
    results = [emulated.attend(found, cache, query_THD, [1, 1]) for found in libraries if found is not None]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_long_context_stays_exact(kernels: ctypes.CDLL) -> None:
    """Nearly uniform attention: sums of offsets are thousands of times the result."""
    codec = random_codec(1, 64, bands((4, 64)), bands((2, 64)))
    cache = random_cache(codec, [8192], 64)
    assert_exact(kernels, cache, 0.05 * random_query(1, 4, 64), [1])


@pytest.mark.parametrize(("bits", "outliers"), [(16, 0), (8, 0), (4, 0), (2, 0), (8, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize("case", ["outlier channels", "constant tokens", "zeros", "huge", "dominant token", "sink"])
def test_adversarial_values(kernels: ctypes.CDLL, bits: int, outliers: int, case: str) -> None:
    generator = torch.Generator().manual_seed(3)
    keys_THD, values_THD = torch.randn(2, 180, 2, 64, generator=generator)
    query_THD = random_query(3, 8, 64)
    if case == "outlier channels":
        keys_THD[..., ::13] *= 100
        values_THD[..., 5] *= 100
        query_THD *= 0.02  # scores of ordinary size: a half's rounding of larger ones is larger, whoever rounds
    elif case == "constant tokens":
        keys_THD[:] = keys_THD[0]
        values_THD[:] = values_THD[0]
    elif case == "zeros":
        keys_THD[:], values_THD[:] = 0, 0
        query_THD[1] = 0
    elif case == "huge":  # gains near a half's largest
        keys_THD[:] = 6e4 * keys_THD.sign()
        values_THD[:] = 6e4 * values_THD.sign()
        query_THD *= 1e-6
    elif case == "dominant token":
        keys_THD[77] = 10 * query_THD[2, ::4]
    else:
        keys_THD[0, :, 3] = 100
        values_THD[0] *= 1e-3
    side = bands((bits, 64), outliers=outliers)
    cache = fill(random_codec(2, 64, side, side), [keys_THD], [values_THD], 64)
    output_THD, _ = emulated.attend(kernels, cache, query_THD, [3])
    expected_THD, _ = exact(cache, query_THD, [0, 3], 0.125)
    # Zeros are the mean plus its opposite: the mean is the size of what is added up.
    size = max(float(expected_THD.norm()), float(cache.codec.v.mean_HD.norm()))
    assert float((output_THD.double() - expected_THD).norm()) < bar(side) * size


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_queries_beyond_the_range_of_a_half(kernels: ctypes.CDLL, scale: float) -> None:
    side = bands((4, 64), outliers=1)
    cache = random_cache(random_codec(1, 64, side, side), [100], 64)
    query_THD = scale * random_query(1, 4, 64)
    output_THD, _ = emulated.attend(kernels, cache, query_THD, [1], softmax_scale=0.125 / scale)
    expected_THD, _ = exact(cache, query_THD, [0, 1], 0.125 / scale)
    assert relative_error(output_THD, expected_THD) < bar(side)


def test_a_query_that_is_not_finite_stays_visible(kernels: ctypes.CDLL) -> None:
    cache = random_cache(random_codec(1, 64, bands((4, 64)), bands((4, 64))), [70], 64)
    query_THD = random_query(2, 2, 64)
    query_THD[0, 1, 5] = torch.nan
    output_THD, _ = emulated.attend(kernels, cache, query_THD, [2], splits=2)
    assert output_THD[0, 1].isnan().all()
    assert output_THD[:, 0].isfinite().all()
    assert output_THD[1].isfinite().all()


def test_requests_without_queries_are_skipped(kernels: ctypes.CDLL) -> None:
    cache = random_cache(random_codec(1, 64, bands((4, 64)), bands((4, 64))), [20, 30, 40], 64)
    output_THD, _ = emulated.attend(kernels, cache, random_query(2, 2, 64), [1, 0, 1])
    expected_THD, _ = exact(cache, random_query(2, 2, 64), [0, 1, 1, 2], 64**-0.5)
    assert relative_error(output_THD, expected_THD) < bar(bands((4, 64)))


def test_damaged_channel_numbers_are_ignored(kernels: ctypes.CDLL) -> None:
    side = bands((4, 64), outliers=2)
    cache = random_cache(random_codec(1, 64, side, side), [70], 64)
    first = int(cache.block_table_RN[0, 0])
    for place in (cache.layout.k, cache.layout.v):
        cache.pages_NHX[first, :, place.outlier_offset : place.outlier_offset + 4] = 0
    expected_THD, _ = emulated.attend(kernels, cache, random_query(2, 2, 64), [2])
    for place in (cache.layout.k, cache.layout.v):
        cache.pages_NHX[first, :, place.channel_offset : place.channel_offset + 2] = 200
        cache.pages_NHX[first, :, place.outlier_offset : place.outlier_offset + 4] = 0x3C
    found_THD, _ = emulated.attend(kernels, cache, random_query(2, 2, 64), [2])
    assert torch.equal(found_THD, expected_THD)


@pytest.mark.parametrize("name", golden.SIDES)
@pytest.mark.parametrize("whole", [False, True])
def test_golden_bytes(kernels: ctypes.CDLL, name: str, whole: bool) -> None:
    """Tokens stored one by one in any order, or as a block, over memory that held something else."""
    stored = committed.read(name)
    pages_NHX = torch.full((3, *stored.fragment_HX.shape), POISON, dtype=torch.uint8)
    op = CudaHeads(kernels, stored.codec)
    if whole:
        op.compress(pages_NHX, stored.keys_THD, stored.values_THD, torch.tensor([1]))
    else:
        for chosen in torch.randperm(golden.BLOCK_SIZE, generator=torch.Generator().manual_seed(1)).split(25):
            tokens = (stored.keys_THD[chosen], stored.values_THD[chosen])
            op.append(pages_NHX, *tokens, chosen + golden.BLOCK_SIZE)
    assert torch.equal(pages_NHX[1], stored.fragment_HX)
    assert bool((pages_NHX[::2] == POISON).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "spec"),
    [
        (64, bands((16, 40))),
        (64, bands((8, 64))),
        (64, bands((4, 64))),
        (64, bands((8, 8), (4, 24), (2, 8), outliers=2)),
        (256, bands((16, 192))),
        (256, bands((8, 40), (4, 136), (2, 80), outliers=2)),
    ],
)
def test_appended_bytes_with_a_projection(
    kernels: ctypes.CDLL, head_dim: int, spec: SideSpec, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    keys_THD, values_THD = torch.randn(2, 40, 6, head_dim, generator=generator).to(dtype)[:, :, 2:4]
    codec = random_codec(2, head_dim, spec, spec)
    slots_T = torch.randperm(384, generator=generator)[:40]
    slots_T[3], slots_T[7] = -1, 384  # padding; outside the cache
    layout = PageLayout.of(codec.spec, 128)
    plain_NHX, found_NHX = (torch.zeros(3, 2, layout.record_bytes, dtype=torch.uint8) for _ in range(2))
    inside = slots_T < 384
    pages.append(plain_NHX, layout, codec, keys_THD[inside], values_THD[inside], slots_T[inside])
    CudaHeads(kernels, codec).append(found_NHX, keys_THD, values_THD, slots_T)
    expected_NHX = fragment.to_fragment(plain_NHX, codec.spec, 128)
    # Sums in another order move a latent across a rounding boundary now and then.
    assert float((found_NHX != expected_NHX).float().mean()) < (
        5e-3 if spec.bands[0].bits == 16 or spec.outliers else 2e-4
    )


@pytest.mark.parametrize("case", ["zeros", "constant", "huge", "tiny", "infinite", "nan"])
@pytest.mark.parametrize("spec", [bands((16, 32)), bands((8, 8), (4, 8), (2, 16), outliers=2)])
def test_adversarial_tokens(kernels: ctypes.CDLL, spec: SideSpec, case: str) -> None:
    x_THD = golden.tokens(0)[:16].clone()
    codec = golden.codec_of(spec, spec)
    if case in ("zeros", "constant"):
        x_THD[:] = 3.25 * (case == "constant")
    elif case in ("huge", "tiny"):
        x_THD *= 1e6 if case == "huge" else 1e-7
    else:
        x_THD[3] = torch.nan if case == "nan" else torch.inf
    layout = PageLayout.of(codec.spec, 64)
    plain_NHX, found_NHX = (torch.zeros(1, 2, layout.record_bytes, dtype=torch.uint8) for _ in range(2))
    pages.append(plain_NHX, layout, codec, x_THD, x_THD, torch.arange(16))
    CudaHeads(kernels, codec).append(found_NHX, x_THD, x_THD, torch.arange(16))
    found_NHX = fragment.to_token_major(found_NHX, codec.spec, 64)
    assert float((found_NHX != plain_NHX).float().mean()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gather(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    sides = [
        (64, bands((16, 40)), bands((8, 8), (4, 24), (2, 8), outliers=2)),
        (64, bands((2, 64)), bands((8, 56))),
        (256, bands((16, 256)), bands((8, 40), (4, 136), (2, 80), outliers=2)),
    ]
    for head_dim, k, v in sides:
        codec = random_codec(2, head_dim, k, v)
        cache = emulated.to_fragment(random_cache(codec, [200], 128), CudaHeads(kernels, codec))
        found = cache.op.read(cache.pages_NHX, cache.block_table_RN[0], 200, dtype)
        expected = pages.read(cache.pages_NHX, cache.layout, cache.codec, cache.block_table_RN[0, :2].long(), 200)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other.to(dtype), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("spec", [bands((16, 256)), bands((8, 40), (4, 136), (2, 80), outliers=1)])
def test_wide_heads_stored_one_by_one_or_as_blocks_are_the_same(kernels: ctypes.CDLL, spec: SideSpec) -> None:
    codec = random_codec(1, 256, spec, spec)
    op, layout = CudaHeads(kernels, codec), PageLayout.of(codec.spec, 64, FRAGMENT)
    tokens = torch.randn(2, 64, 1, 256, generator=torch.Generator().manual_seed(5)).unbind()
    one_NHX, other_NHX = (torch.zeros(2, 1, layout.record_bytes, dtype=torch.uint8) for _ in range(2))
    op.append(one_NHX, *tokens, torch.arange(64, 128))
    op.compress(other_NHX, *tokens, torch.tensor([1]))
    assert torch.equal(one_NHX, other_NHX)
    assert not one_NHX[0].any()


@pytest.mark.parametrize(("kilobytes", "outside"), [(227, []), (163, [(16, 16)]), (99, [(16, 16), (8, 8)])])
def test_wide_heads_need_shared_memory(
    kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, kilobytes: int, outside: list[tuple[int, int]]
) -> None:
    """An H200 has room for everything, an A100 and an RTX 4090 do not."""
    monkeypatch.setenv("KVC_EMULATED_SHARED_BYTES", str(kilobytes * 1024))
    for head_dim in (128, 256):
        for bits in [(16, 16), (8, 8), (8, 4), (4, 4), (2, 2)]:
            k, v = (bands((number, head_dim)) for number in bits)
            found = cuda.fits.__wrapped__(kernels, HeadsSpec(2, head_dim, k, v))
            assert found == (head_dim == 128 or bits not in outside), (head_dim, bits)


def test_what_the_kernels_refuse(kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of three chunks; in Python, and once more where it would do harm."""
    codec = random_codec(1, 64, bands((4, 64)), bands((4, 64)))
    pages_NHX = random_cache(codec, [64], 192).pages_NHX
    op, tokens = CudaHeads(kernels, codec), torch.zeros(192, 1, 64)
    assert not cuda.covers_blocks(192)
    with pytest.raises(AssertionError, match="192"):
        op.layout(pages_NHX)
    monkeypatch.setattr(cuda, "covers_blocks", lambda block_size: True)
    with pytest.raises(ValueError, match="shape"):
        op.compress(pages_NHX, tokens, tokens, torch.tensor([0]))


def test_splits_fill_the_device() -> None:
    assert gpu.choose_splits(blocks=8, context=131072, multiprocessors=132) == 66
    assert gpu.choose_splits(blocks=256, context=131072, multiprocessors=132) == 3
    assert gpu.choose_splits(blocks=8, context=512, multiprocessors=132) == 1
