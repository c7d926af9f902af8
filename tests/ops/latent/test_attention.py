"""MLA latents: compiled append and attention against the torch code and against float64."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases.heads import relative_error
from benchmarks.cases.latent import Cache
from kvcompress.ops import library
from kvcompress.ops.call import Call
from kvcompress.ops.interface.common import MAX_LATENT_CHANNELS
from kvcompress.ops.latent.cpu import CpuLatent
from kvcompress.ops.latent.graph import latent_append, latent_attend
from kvcompress.ops.latent.reference import LatentOp

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "rank", "heads"), [(576, 512, 32), (72, 56, 5), (36, 33, 16), (48, 48, 128), (20, 3, 1)]
)
def test_against_float64(level: str, channels: int, rank: int, heads: int, dtype: torch.dtype) -> None:
    query_lens = [1, 1, 5, 0, 17, 64]
    cache = Cache([1, 16, 63, 5, 150, 64], channels, dtype)
    query_THC = cache.query(sum(query_lens), heads)
    found_THR = cache.attend(query_THC, query_lens, rank)
    assert relative_error(found_THR, cache.exact(query_THC, query_lens, rank)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_and_outputs_in_sixteen_bits(level: str, dtype: torch.dtype) -> None:
    cache = Cache([40, 7], 40, dtype)
    query_THC = cache.query(3, 8, dtype)
    found_THR = cache.attend(query_THC, [1, 2], 24)
    assert relative_error(found_THR, cache.exact(query_THC, [1, 2], 24)) < torch.finfo(dtype).eps


def test_results_depend_on_neither_threads_nor_splits(level: str) -> None:
    cache = Cache([700, 300, 129], 40, torch.bfloat16)
    query_THC = cache.query(42, 32)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(cache.attend(query_THC, [1, 40, 1], 32, split_tokens=128))
    assert all(torch.equal(result, results[0]) for result in results[1:])
    whole_THR = cache.attend(query_THC, [1, 40, 1], 32)
    assert relative_error(results[0], whole_THR.double()) < 2e-6


def test_strided_queries_and_outputs(level: str) -> None:
    cache = Cache([90, 33], 40, torch.float32)
    query_THC = cache.query(4, 6)
    wide_THC = torch.zeros(6, 13, 50)
    wide_THC[1:5, :12:2, :40] = query_THC
    output_THR = torch.zeros(4, 9, 30)
    numbers = (torch.tensor([0, 1, 4]), torch.tensor(cache.seq_lens))
    call = Call(output_THR[:, 2:8, 1:25], wide_THC[1:5, :12:2, :40], cache.block_table_RN, *numbers, 0.1)
    cache.op.attend(call, cache.pages_NSC)
    assert torch.equal(output_THR[:, 2:8, 1:25], cache.attend(query_THC, [1, 3], 24))
    assert not output_THR[:, :2].any()
    assert not output_THR[..., 25:].any()


@pytest.mark.parametrize("case", ["dominant token", "large", "zeros"])
def test_adversarial_values(level: str, case: str) -> None:
    cache = Cache([180], 40, torch.float32)
    query_THC = cache.query(3, 8)
    keys_LC = cache.keys[0]
    if case == "dominant token":
        keys_LC[77] = 100 * query_THC[2, 3]
    elif case == "large":
        keys_LC *= 100
    else:
        keys_LC[:], query_THC[1] = 0, 0
    token_T = torch.arange(180)
    cache.op.append(cache.pages_NSC, keys_LC, cache.block_table_RN[0].long()[token_T // 16] * 16 + token_T % 16)
    found_THR, expected_THR = cache.attend(query_THC, [3], 24), cache.exact(query_THC, [3], 24)
    # Scores in the thousands carry float32's error into the exponent.
    assert float((found_THR - expected_THR).norm()) <= 1e-3 * float(expected_THR.norm())


def test_a_query_that_is_not_finite_stays_visible(level: str) -> None:
    cache = Cache([70], 40, torch.float32)
    query_THC = cache.query(2, 2)
    query_THC[0, 1, 5] = torch.nan
    found_THR = cache.attend(query_THC, [2], 24)
    assert found_THR[0, 1].isnan().all()
    assert found_THR[:, 0].isfinite().all()
    assert found_THR[1].isfinite().all()


@pytest.mark.parametrize("pages", DTYPES)
@pytest.mark.parametrize("keys", DTYPES)
def test_append_writes_what_torch_does(level: str, pages: torch.dtype, keys: torch.dtype) -> None:
    cache = Cache([40], 37, pages)
    key_TC = torch.randn(6, 37, generator=cache.generator).to(keys)
    slots_T = torch.tensor([5, -1, 20, -1, 17, 63], dtype=torch.int32)
    written, expected = cache.pages_NSC.clone(), cache.pages_NSC.clone()
    assert isinstance(cache.op, CpuLatent)
    cache.op.append(written, key_TC, slots_T)
    LatentOp().append(expected, key_TC, slots_T)
    torch.testing.assert_close(written, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("compiled")
class TestRefusals:
    def test_blocks_outside_the_cache(self) -> None:
        cache = Cache([40], 24, torch.float32)
        cache.block_table_RN[0, 1] = 10_000
        with pytest.raises(ValueError, match="outside the cache"):
            cache.attend(cache.query(1, 2), [1], 16)
        with pytest.raises(ValueError, match="outside the cache"):
            cache.op.append(cache.pages_NSC, torch.zeros(1, 24), torch.tensor([10_000]))

    def test_more_queries_than_tokens(self) -> None:
        cache = Cache([40], 24, torch.float32)
        with pytest.raises(ValueError, match="fewer tokens than queries"):
            cache.attend(cache.query(41, 2), [41], 16)


@pytest.mark.usefixtures("without_library")
def test_without_the_library() -> None:
    cache = Cache([40, 9], 24, torch.bfloat16)
    query_THC = cache.query(4, 3)
    assert library.load() is None
    assert relative_error(cache.attend(query_THC, [1, 3], 16), cache.exact(query_THC, [1, 3], 16)) < 1e-5


def test_opcheck() -> None:
    cache = Cache([40, 17], 24, torch.float32)
    query_THC = cache.query(3, 4)
    lengths_R, starts_R = torch.tensor([40, 17], dtype=torch.int32), torch.tensor([0, 1, 3], dtype=torch.int32)
    pages_NSC = cache.pages_NSC.contiguous()
    arguments = (query_THC, pages_NSC, cache.block_table_RN, starts_R, lengths_R, 16, 0.1)
    torch.library.opcheck(latent_attend, arguments, test_utils=CHECKS)
    assert torch.equal(torch.ops.kvcompress.latent_attend(*arguments), cache.attend(query_THC, [1, 2], 16))
    finite_NSC = pages_NSC.nan_to_num()
    stored = (query_THC[:, 0], torch.tensor([3, -1, 20]))
    torch.library.opcheck(latent_append, (finite_NSC, *stored, 16), test_utils=CHECKS)
    expected_NSC = finite_NSC.clone()
    cache.op.append(expected_NSC, *stored)
    torch.ops.kvcompress.latent_append(finite_NSC, *stored, 16)
    assert torch.equal(finite_NSC, expected_NSC)


@pytest.mark.usefixtures("compiled")
def test_whom_the_cpu_has_attend() -> None:
    """Kernels, but not of more channels or other numbers than they know."""
    for channels, dtype, expected in (
        (MAX_LATENT_CHANNELS, torch.float32, CpuLatent),
        (37, torch.bfloat16, CpuLatent),
        (MAX_LATENT_CHANNELS + 1, torch.float32, LatentOp),
        (64, torch.float64, LatentOp),
    ):
        assert type(Cache([3], channels, dtype).op) is expected
