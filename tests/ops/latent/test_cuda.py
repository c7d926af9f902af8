"""The CUDA kernels for MLA latents: their own source, run on the CPU, against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.cases.heads import relative_error
from benchmarks.cases.latent import SHAPES, Cache, bar
from kvcompress.ops.call import Call
from kvcompress.ops.latent import cuda as cuda_latent
from kvcompress.ops.latent.cuda import CudaLatent
from kvcompress.ops.latent.reference import LatentOp
from tests.ops import emulated

DTYPES = [torch.bfloat16, torch.float16]


def bound(kernels: ctypes.CDLL) -> CudaLatent:
    return CudaLatent(kernels, torch.device("cpu"))


def attend(
    kernels: ctypes.CDLL, cache: Cache, query_THC: Tensor, query_lens: Sequence[int], rank: int, splits: int = 1
) -> Tensor:
    assert cuda_latent.covers(kernels, cache.pages_NSC.shape[2], cache.pages_NSC.dtype)
    call = cache.call(query_THC, query_lens, rank)
    bound(kernels).attend(call, cache.pages_NSC, splits)
    return call.output_THD


def store(kernels: ctypes.CDLL, cache: Cache, keys_LC: Tensor) -> None:
    """Other tokens for the first request."""
    token_T = torch.arange(keys_LC.shape[0])
    slots_T = cache.block_table_RN[0].long()[token_T // 16] * 16 + token_T % 16
    bound(kernels).append(cache.pages_NSC, keys_LC, slots_T)


def assert_exact(
    kernels: ctypes.CDLL, cache: Cache, query_THC: Tensor, query_lens: Sequence[int], rank: int, splits: int = 1
) -> Tensor:
    found_THR = attend(kernels, cache, query_THC, query_lens, rank, splits)
    expected_THR = cache.exact(query_THC, query_lens, rank)
    assert relative_error(found_THR, expected_THR) < bar(query_THC.dtype)
    return found_THR


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "rank", "heads"), SHAPES)
def test_every_instance(kernels: ctypes.CDLL, channels: int, rank: int, heads: int, dtype: torch.dtype) -> None:
    """Ragged lengths, NaN in everything never written, table entries of -1, strided pages, no or few queries."""
    query_lens = [1, 1, 0, 2, 1]
    cache = Cache([1, 31, 9, 33, 230], channels, dtype)
    assert_exact(kernels, cache, cache.query(5, heads, dtype), query_lens, rank)


@pytest.mark.parametrize(("channels", "rank", "heads"), [(48, 40, 20), (48, 48, 3), (592, 530, 2)])
def test_splits_agree(kernels: ctypes.CDLL, channels: int, rank: int, heads: int) -> None:
    """Also with more splits than tokens for them, and with splits that a token's own rows do not reach."""
    query_lens = [12, 1, 1]
    cache = Cache([134, 300, 1], channels, torch.float16)
    query_THC = cache.query(14, heads, torch.float16)
    whole_THR = assert_exact(kernels, cache, query_THC, query_lens, rank)
    for splits in (2, 40):
        split_THR = assert_exact(kernels, cache, query_THC, query_lens, rank, splits)
        assert relative_error(split_THR, whole_THR.double()) < bar(torch.float16)


@pytest.mark.parametrize("block_size", [1, 16, 24, 128])
def test_block_sizes(kernels: ctypes.CDLL, block_size: int) -> None:
    cache = Cache([block_size, block_size + 1, 150], 32, torch.bfloat16, block_size)
    assert_exact(kernels, cache, cache.query(5, 2, torch.bfloat16), [1, 2, 2], 24, splits=2)


def test_the_two_ways_of_copying_agree() -> None:
    libraries = [emulated.library(copies) for copies in emulated.COPIES]
    if None in libraries:
        pytest.skip("no C++ compiler to emulate the CUDA kernels with")
    cache = Cache([300, 64], 576, torch.bfloat16)
    query_THC = cache.query(2, 32, torch.bfloat16)
    results = [attend(found, cache, query_THC, [1, 1], 512, 2) for found in libraries if found is not None]
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("case", ["dominant token", "ever larger scores", "large", "zeros"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adversarial_values(kernels: ctypes.CDLL, case: str, dtype: torch.dtype, splits: int) -> None:
    cache = Cache([180], 48, dtype)
    query_THC = cache.query(3, 8, dtype)
    keys_LC = cache.keys[0]
    if case == "dominant token":
        keys_LC[77] = 100 * query_THC[2, 3]
    elif case == "ever larger scores":
        keys_LC[:, 47] = torch.arange(180) / 2
        query_THC[..., 47] = 4
    elif case == "large":
        keys_LC *= 100
    else:
        keys_LC[:], query_THC[1] = 0, 0
    store(kernels, cache, keys_LC)
    found_THR, expected_THR = attend(kernels, cache, query_THC, [3], 24, splits), cache.exact(query_THC, [3], 24)
    # Scores in the thousands carry float32's error into the exponent.
    assert float((found_THR - expected_THR).norm()) <= 1.5 * bar(dtype) * float(expected_THR.norm())


def test_weights_add_up_to_one(kernels: ctypes.CDLL) -> None:
    """One token takes twice the weight of the others, which is far from a bfloat16: all of them are off alike."""
    cache = Cache([180], 48, torch.bfloat16)
    query_THC = torch.zeros(1, 4, 48).bfloat16()
    keys_LC = cache.keys[0]
    keys_LC[:, 47], keys_LC[0, 47], query_THC[..., 47] = 0, 1.7265625, 4
    keys_LC[:, :24] += 3
    store(kernels, cache, keys_LC)
    expected = cache.exact(query_THC, [1], 24)
    found = attend(kernels, cache, query_THC, [1], 24).double()
    assert abs(float((found * expected).sum() / expected.square().sum()) - 1) < 5e-4


def test_a_query_that_is_not_finite_stays_visible(kernels: ctypes.CDLL) -> None:
    cache = Cache([150], 48, torch.bfloat16)
    query_THC = cache.query(2, 2, torch.bfloat16)
    query_THC[0, 1, 5] = torch.nan
    for splits in (1, 2):
        found_THR = attend(kernels, cache, query_THC, [2], 24, splits)
        assert found_THR[0, 1].isnan().all()
        assert found_THR[:, 0].isfinite().all()
        assert found_THR[1].isfinite().all()


def test_strided_queries_and_outputs(kernels: ctypes.CDLL) -> None:
    """What lies between rows, and padding behind the last request, is not written."""
    cache = Cache([90, 33], 48, torch.float16)
    query_THC = cache.query(4, 6, torch.float16)
    wide_THC, output_THR = torch.zeros(6, 13, 50).half(), torch.zeros(6, 9, 31).half()
    wide_THC[1:5, :12:2, :48] = query_THC
    chosen = output_THR[:, 2:8, 1:25]
    numbers = [torch.tensor(rows, dtype=torch.int32) for rows in ([0, 1, 4], cache.seq_lens)]
    call = Call(chosen, wide_THC[1:, :12:2, :48], cache.block_table_RN, *numbers, 0.1, max_query_len=3)
    for splits in (1, 2):
        bound(kernels).attend(call, cache.pages_NSC, splits)
        assert torch.equal(chosen[:4], attend(kernels, cache, query_THC, [1, 3], 24, splits))
        chosen[:4] = 0
        assert not output_THR.any()


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize("channels", [64, 37])
def test_append_writes_what_torch_does(kernels: ctypes.CDLL, channels: int, dtype: torch.dtype) -> None:
    cache = Cache([40], channels, dtype)
    key_TC = torch.randn(6, 2, channels, generator=cache.generator).to(dtype)[:, 1]
    outside = cache.pages_NSC.shape[0] * 16
    slots_T = torch.tensor([5, -1, outside, 20, 17, outside - 1], dtype=torch.int32)
    written, expected = cache.pages_NSC.clone(), cache.pages_NSC.clone()
    bound(kernels).append(written, key_TC, slots_T)
    LatentOp().append(expected, key_TC[slots_T < outside], slots_T[slots_T < outside])
    torch.testing.assert_close(written, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("kilobytes", "channels"), [(227, 2272), (163, 1584), (99, 896)])
def test_most_channels(kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, kilobytes: int, channels: int) -> None:
    """Of an H200, an A100 and an RTX 4090; the kernels keep to it, with fewer tiles on their way."""
    monkeypatch.setenv("KVC_EMULATED_SHARED_BYTES", str(kilobytes * 1024))
    assert cuda_latent.most_channels.__wrapped__(kernels) == channels
    for few, rank, heads in ((channels, 40, 1), (576, 512, 20)):
        cache = Cache([70], few, torch.float16)
        assert_exact(kernels, cache, cache.query(1, heads, torch.float16), [1], rank)


def test_what_the_kernels_do_not_cover(kernels: ctypes.CDLL) -> None:
    """The kernels themselves refuse it."""
    most = cuda_latent.most_channels(kernels)
    assert most == 2272

    def covers(channels: int = 64, dtype: torch.dtype = torch.bfloat16) -> bool:
        found = cuda_latent.covers(kernels, channels, dtype)
        if not found:
            query_THC, output_THR = (torch.zeros(1, 2, number, dtype=dtype) for number in (channels, 16))
            numbers = (torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1]).int(), torch.tensor([1]).int())
            pages_NSC = torch.zeros(1, 16, channels, dtype=dtype)
            with pytest.raises(ValueError, match="shape"):
                bound(kernels).attend(Call(output_THR, query_THC, *numbers, 0.1), pages_NSC)
        return found

    assert covers()
    assert covers(dtype=torch.float16)
    assert covers(most)
    assert not covers(most + 16)
    assert not covers(56)
    assert not covers(dtype=torch.float32)


def test_pages_that_are_not_aligned_are_refused(kernels: ctypes.CDLL) -> None:
    numbers = (torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1]).int(), torch.tensor([1]).int())
    query_THC, plain_NSC = torch.zeros(1, 2, 64).half(), torch.zeros(2, 16, 64).half()
    for pages_NSC in (torch.zeros(2, 16, 68).half()[..., :64], plain_NSC.flatten()[4:1028].view(1, 16, 64)):
        with pytest.raises(AssertionError):
            bound(kernels).attend(Call(query_THC, query_THC, *numbers, 0.1), pages_NSC)


def test_queries_that_are_not_aligned_are_brought_together(kernels: ctypes.CDLL) -> None:
    cache = Cache([70, 33], 64, torch.float16)
    query_THC = cache.query(3, 2, torch.float16)
    uneven_THC = torch.zeros(3, 2, 65).half()[..., :64].copy_(query_THC)
    odd_THC = torch.zeros(385).half()[1:].view(3, 2, 64).copy_(query_THC)
    expected_THR = assert_exact(kernels, cache, query_THC, [1, 2], 40)
    for other_THC in (uneven_THC, odd_THC):
        assert torch.equal(attend(kernels, cache, other_THC, [1, 2], 40), expected_THR)


def test_splits_fill_the_device() -> None:
    def splits(requests: int, heads: int, context: int) -> int:
        return cuda_latent.choose_splits(requests, heads, context, multiprocessors=132)

    assert splits(1, 32, 131072) == 132
    assert splits(1, 16, 131072) == 264
    assert splits(8, 128, 131072) == 4
    assert splits(32, 32, 131072) == 4
    assert splits(32, 128, 131072) == 1
    assert splits(1, 32, 4096) == 32
    assert splits(1, 32, 16) == 1
    assert splits(48, 32, 131072) == 11  # 528 blocks in four turns
