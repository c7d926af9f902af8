"""The public operations on CUDA kernels, the emulation in the place of a GPU; bulk encoding and decoding anywhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvcompress.codec.heads.layout import FRAGMENT, PageLayout
from kvcompress.ops import cuda_library, gpu
from kvcompress.ops.heads import cuda, prefill, reference
from kvcompress.ops.heads.append import append
from kvcompress.ops.heads.attention import decode_attention
from kvcompress.ops.heads.compress import compress_pages, compress_pages_op
from kvcompress.ops.heads.gather import gather_decode, gather_decode_op
from kvcompress.ops.heads.plan import HeadsPlan
from tests.ops import emulated
from tests.ops.heads.cases import Cache, bands, exact, random_cache, random_codec, relative_error, starts
from tests.ops.heads.cuda_sides import bar

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
K_SIDE, V_SIDE = bands((8, 16), (4, 48), outliers=1), bands((4, 40))


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.count_as_gpu(monkeypatch)


def a_cache() -> Cache:
    return random_cache(random_codec(2, 64, K_SIDE, V_SIDE), [100, 70], 64)


def attend(cache: Cache, query_lens: list[int]) -> tuple[Tensor, Tensor]:
    query_THD = torch.randn(sum(query_lens), 4, 64, generator=torch.Generator().manual_seed(4))
    output_THD = torch.full_like(query_THD, torch.nan)
    batch = (cache.block_table_RN, starts(query_lens), cache.seq_lens)
    decode_attention(output_THD, query_THD, cache.pages_NHX, cache.layout, cache.plan, *batch, 0.125)
    return output_THD, query_THD


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("query_lens", [[1, 1], [3, 0], [70, 1]])
def test_attention(query_lens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Many queries are a prefill and go to torch, on latents that a kernel gathered."""
    calls: list[str] = []
    for name in ("attend", "gather"):
        function = getattr(cuda, name)
        monkeypatch.setattr(cuda, name, lambda *args, f=function, n=name: (calls.append(n), f(*args))[1])
    cache = a_cache()
    output_THD, query_THD = attend(emulated.to_fragment(cache), query_lens)
    expected_THD, _ = exact(cache, query_THD, starts(query_lens), 0.125)
    assert relative_error(output_THD, expected_THD) < bar(K_SIDE)
    assert set(calls) == ({"gather"} if max(query_lens) > gpu.MOST_QUERIES else {"attend"})


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("dtype", prefill.FUSED_DTYPES)
@pytest.mark.parametrize(("block_size", "step"), [(64, 8192), (64, 128), (128, 64)])
def test_prompts_in_half_precision(
    dtype: torch.dtype, block_size: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch attends keys and values that were decoded in one step or several, of requests with a past or without."""
    monkeypatch.setattr(prefill, "STEP_TOKENS", step)
    monkeypatch.setattr(reference, "decode_attention", lambda *args: pytest.fail("in float32"))
    cache = random_cache(random_codec(2, 64, K_SIDE, V_SIDE), [300, 70, 70, 64], block_size)
    fragments, query_lens = emulated.to_fragment(cache), [100, 70, 0, 1]
    query_THD = torch.randn(sum(query_lens), 4, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    output_THD = torch.full_like(query_THD, torch.nan)
    layer = (fragments.pages_NHX, fragments.layout, fragments.plan, fragments.block_table_RN)
    decode_attention(output_THD, query_THD, *layer, starts(query_lens), cache.seq_lens, 0.125)
    expected_THD, _ = exact(cache, query_THD, starts(query_lens), 0.125)
    # Keys, values and probabilities are rounded to 8 or 11 bits.
    assert relative_error(output_THD, expected_THD) < (8e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.usefixtures("on_device")
def test_tokens_stored_one_by_one_or_as_blocks_are_the_same() -> None:
    codec = random_codec(2, 64, K_SIDE, V_SIDE)
    layout, plan = PageLayout.of(codec.spec, 64, FRAGMENT), HeadsPlan.of(codec)
    keys_THD, values_THD = torch.randn(2, 128, 2, 64, generator=torch.Generator().manual_seed(5))
    one_NHX, other_NHX = (torch.zeros(4, 2, layout.record_bytes, dtype=torch.uint8) for _ in range(2))
    slots_T = torch.cat([torch.arange(192, 256), torch.arange(64)])
    append(one_NHX, layout, plan, keys_THD, values_THD, slots_T.int())
    compress_pages(other_NHX, layout, plan, keys_THD, values_THD, torch.tensor([3, 0]))
    assert torch.equal(one_NHX, other_NHX)


@pytest.mark.usefixtures("on_device")
def test_gather() -> None:
    cache = a_cache()
    fragments = emulated.to_fragment(cache)
    arguments = (cache.plan, cache.block_table_RN[0], 100)
    found = gather_decode(fragments.pages_NHX, fragments.layout, *arguments)
    # Token-major pages are not the CUDA kernels': this goes to torch.
    expected = gather_decode(cache.pages_NHX, cache.layout, *arguments)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ["token_major", FRAGMENT])
def test_operations_on_a_cpu(order: str) -> None:
    """The same with pages in either order, without a GPU: the CPU's kernels, or torch."""
    codec = random_codec(2, 64, K_SIDE, V_SIDE)
    layout, plan = PageLayout.of(codec.spec, 64, order), HeadsPlan.of(codec)
    keys_THD, values_THD = torch.randn(2, 128, 2, 64, generator=torch.Generator().manual_seed(5))
    pages_NHX = torch.zeros(4, 2, layout.record_bytes, dtype=torch.uint8)
    compress_pages(pages_NHX, layout, plan, keys_THD, values_THD, torch.tensor([3, 0]))
    k_THR, v_THR = gather_decode(pages_NHX, layout, plan, torch.tensor([3, 0]), 100, torch.bfloat16)
    assert k_THR.dtype == torch.bfloat16
    for side, stored, latent_THR in ((codec.k, keys_THD, k_THR), (codec.v, values_THD, v_THR)):
        expected_THR = side.decode(side.encode(stored[:100]))
        assert relative_error(latent_THR.float(), expected_THR.double()) < 5e-3
    table_RN = torch.tensor([[3, 0]], dtype=torch.int32)
    cache = Cache(codec, plan, layout, pages_NHX, table_RN, [100])
    output_THD, query_THD = attend(cache, [2])
    assert relative_error(output_THD, exact(cache, query_THD, [0, 2], 0.125)[0]) < 1e-5


def test_tokens_that_do_not_fill_the_blocks_are_refused() -> None:
    codec = random_codec(1, 64, K_SIDE, V_SIDE)
    layout, plan = PageLayout.of(codec.spec, 64), HeadsPlan.of(codec)
    pages_NHX = torch.zeros(2, 1, layout.record_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match="found 100 tokens for 2 blocks of 64; expected 128"):
        compress_pages(pages_NHX, layout, plan, torch.zeros(100, 1, 64), torch.zeros(100, 1, 64), torch.arange(2))


@pytest.mark.parametrize("order", ["token_major", FRAGMENT])
def test_opcheck(order: str) -> None:
    cache = a_cache() if order == "token_major" else emulated.to_fragment(a_cache())
    pages_NHX, described = cache.pages_NHX.contiguous(), (*cache.plan.flatten(), 64, order)
    tokens_THD = torch.randn(64, 2, 64, generator=torch.Generator().manual_seed(5))
    arguments = (pages_NHX, tokens_THD, tokens_THD, torch.tensor([1]), *described)
    torch.library.opcheck(compress_pages_op, arguments, test_utils=CHECKS)
    torch.library.opcheck(gather_decode_op, (pages_NHX, cache.block_table_RN[0], 70, *described), test_utils=CHECKS)


@pytest.fixture
def fresh() -> Iterator[None]:
    cuda_library.load.cache_clear()
    yield
    cuda_library.load.cache_clear()


@pytest.mark.usefixtures("fresh")
class TestFindingTheLibrary:
    def test_a_missing_library_warns_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(cuda_library.PATH_VARIABLE, raising=False)
        monkeypatch.setattr(cuda_library, "_FILE", "not-there.so")
        with pytest.warns(UserWarning, match="KVCOMPRESS_CUDA=ON"):
            assert cuda_library.load() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cuda_library.load() is None

    def test_an_empty_variable_turns_kernels_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(cuda_library.PATH_VARIABLE, "")
        assert cuda_library.load() is None

    def test_a_file_that_is_no_library_is_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        path = tmp_path / "kernels.so"
        path.write_text("no library")
        monkeypatch.setenv(cuda_library.PATH_VARIABLE, str(path))
        with pytest.raises(ValueError, match=r"kernels\.so is not a library"):
            cuda_library.load()

    def test_another_interface_version_is_not_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = emulated.library("sm_80")
        if found is None:
            pytest.skip("no C++ compiler to emulate the CUDA kernels with")
        monkeypatch.setattr(cuda_library, "ABI_VERSION", cuda_library.ABI_VERSION + 1)
        with pytest.warns(UserWarning, match="build the library again"):
            assert cuda_library.open_library(Path(found._name)) is None
