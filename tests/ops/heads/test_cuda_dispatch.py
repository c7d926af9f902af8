"""The public operations on CUDA kernels, the emulation in the place of a GPU; bulk encoding and decoding anywhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.cases.heads import Cache, bands, exact, random_cache, random_codec, relative_error, starts
from benchmarks.cases.heads_sides import bar
from kvcompress.codec.heads.layout import PageLayout
from kvcompress.codec.layout import FRAGMENT, TOKEN_MAJOR
from kvcompress.ops import cuda_library, gpu
from kvcompress.ops.call import Call
from kvcompress.ops.heads import prefill
from kvcompress.ops.heads.attention import bind, order
from kvcompress.ops.heads.cuda import CudaHeads
from kvcompress.ops.heads.reference import HeadsOp
from tests.ops import emulated

K_SIDE, V_SIDE = bands((8, 16), (4, 48), outliers=1), bands((4, 40))


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.count_as_gpu(monkeypatch)


def a_cache() -> Cache:
    return random_cache(random_codec(2, 64, K_SIDE, V_SIDE), [100, 70], 64)


def in_fragments(cache: Cache) -> Cache:
    return emulated.to_fragment(cache, bind(cache.codec, "cpu"))


def random_query(query_lens: list[int]) -> Tensor:
    return torch.randn(sum(query_lens), 4, 64, generator=torch.Generator().manual_seed(4))


def attend(cache: Cache, query_THD: Tensor, query_lens: list[int]) -> Tensor:
    """Output alone: nobody asks for the log of sums in a prompt."""
    output_THD = torch.full_like(query_THD, torch.nan)
    batch = (cache.block_table_RN, starts(query_lens), cache.seq_lens)
    cache.op.attend(Call(output_THD, query_THD, *batch, 0.125), cache.pages_NHX)
    return output_THD


@pytest.mark.usefixtures("on_device")
def test_who_works_on_a_layer() -> None:
    """The kernels where they know it, on pages in their order; else torch, or the CPU's kernels, token by token."""
    assert isinstance(bind(random_codec(1, 64, K_SIDE, V_SIDE), "cpu"), CudaHeads)
    for side in (bands((32, 64)), bands((8, 264))):
        codec = random_codec(1, 64 if side.rank == 64 else 264, side, side)
        assert order(codec.spec, torch.device("cpu")) == TOKEN_MAJOR
        op = bind(codec, "cpu")
        assert (op.on_kernels, op.order) == (False, TOKEN_MAJOR)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("query_lens", [[1, 1], [3, 0], [70, 1]])
def test_attention(query_lens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Many queries are a prefill and go to torch, on latents that a kernel gathered."""
    calls: list[str] = []
    for name in ("attend_latents", "read"):
        function = getattr(CudaHeads, name)
        monkeypatch.setattr(CudaHeads, name, lambda *args, f=function, n=name: (calls.append(n), f(*args))[1])
    cache, query_THD = a_cache(), random_query(query_lens)
    output_THD = attend(in_fragments(cache), query_THD, query_lens)
    expected_THD, _ = exact(cache, query_THD, starts(query_lens), 0.125)
    assert relative_error(output_THD, expected_THD) < bar(K_SIDE)
    assert set(calls) == ({"read"} if max(query_lens) > gpu.MOST_QUERIES else {"attend_latents"})


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("dtype", prefill.FUSED_DTYPES)
@pytest.mark.parametrize(("block_size", "step"), [(64, 8192), (64, 128), (128, 64)])
def test_prompts_in_half_precision(
    dtype: torch.dtype, block_size: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch attends keys and values that were decoded in one step or several, of requests with a past or without."""
    monkeypatch.setattr(prefill, "STEP_TOKENS", step)
    monkeypatch.setattr(HeadsOp, "attend", lambda *args: pytest.fail("in float32"))
    cache = random_cache(random_codec(2, 64, K_SIDE, V_SIDE), [300, 70, 70, 64], block_size)
    query_lens = [100, 70, 0, 1]
    query_THD = random_query(query_lens).to(dtype)
    output_THD = attend(in_fragments(cache), query_THD, query_lens)
    expected_THD, _ = exact(cache, query_THD, starts(query_lens), 0.125)
    # Keys, values and probabilities are rounded to 8 or 11 bits.
    assert relative_error(output_THD, expected_THD) < (8e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.usefixtures("on_device")
def test_tokens_stored_one_by_one_or_as_blocks_are_the_same() -> None:
    op = bind(random_codec(2, 64, K_SIDE, V_SIDE), "cpu")
    keys_THD, values_THD = torch.randn(2, 128, 2, 64, generator=torch.Generator().manual_seed(5))
    one_NHX, other_NHX = (empty_pages(op, 4) for _ in range(2))
    slots_T = torch.cat([torch.arange(192, 256), torch.arange(64)])
    op.append(one_NHX, keys_THD, values_THD, slots_T.int())
    op.compress(other_NHX, keys_THD, values_THD, torch.tensor([3, 0]))
    assert torch.equal(one_NHX, other_NHX)


def empty_pages(op: HeadsOp, blocks: int) -> Tensor:
    layout = PageLayout.of(op.plan.spec, 64, op.order)
    return torch.zeros(blocks, layout.num_kv_heads, layout.record_bytes, dtype=torch.uint8)


@pytest.mark.usefixtures("on_device")
def test_gather() -> None:
    cache = a_cache()
    fragments = in_fragments(cache)
    assert isinstance(fragments.op, CudaHeads)
    found = fragments.op.read(fragments.pages_NHX, cache.block_table_RN[0], 100)
    expected = cache.op.read(cache.pages_NHX, cache.block_table_RN[0], 100)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [TOKEN_MAJOR, FRAGMENT])
def test_operations_on_a_cpu(order: str) -> None:
    """The same with pages in either order, without a GPU: the CPU's kernels, or torch."""
    codec = random_codec(2, 64, K_SIDE, V_SIDE)
    op = bind(codec, "cpu") if order == TOKEN_MAJOR else HeadsOp(codec, FRAGMENT)
    assert op.order == order
    keys_THD, values_THD = torch.randn(2, 128, 2, 64, generator=torch.Generator().manual_seed(5))
    pages_NHX = empty_pages(op, 4)
    op.compress(pages_NHX, keys_THD, values_THD, torch.tensor([3, 0]))
    k_THR, v_THR = op.read(pages_NHX, torch.tensor([3, 0]), 100, torch.bfloat16)
    assert k_THR.dtype == torch.bfloat16
    for side, stored, latent_THR in ((codec.k, keys_THD, k_THR), (codec.v, values_THD, v_THR)):
        expected_THR = side.decode(side.encode(stored[:100]))
        assert relative_error(latent_THR.float(), expected_THR.double()) < 5e-3
    cache = Cache(op, pages_NHX, torch.tensor([[3, 0]], dtype=torch.int32), [100])
    query_THD = random_query([2])
    output_THD = attend(cache, query_THD, [2])
    assert relative_error(output_THD, exact(cache, query_THD, [0, 2], 0.125)[0]) < 1e-5


@pytest.mark.parametrize("device", ["cpu", "on_device"])
def test_tokens_that_do_not_fill_the_blocks_are_refused(request: pytest.FixtureRequest, device: str) -> None:
    if device == "on_device":
        request.getfixturevalue(device)
    op, tokens = bind(random_codec(1, 64, K_SIDE, V_SIDE), "cpu"), torch.zeros(100, 1, 64)
    with pytest.raises(ValueError, match="found 100 tokens for 2 blocks of 64; expected 128"):
        op.compress(empty_pages(op, 2), tokens, tokens, torch.arange(2))


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
