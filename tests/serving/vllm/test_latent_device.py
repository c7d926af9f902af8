"""MLA latents in vLLM on a GPU: the kernels' emulation, batches as vLLM's runner describes them there."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from tests import require

require.need("vllm")

from benchmarks.cases.heads import relative_error
from kvcompress.codec.latent.codec import LatentCodec
from kvcompress.codec.latent.spec import LatentSpec
from kvcompress.codec.spec import CodecSpec
from kvcompress.ops import gpu
from kvcompress.ops.call import Call
from kvcompress.ops.latent import cuda as cuda_latent
from kvcompress.ops.latent.reference import LatentOp
from kvcompress.serving.vllm import compat, latent
from kvcompress.serving.vllm.latent import DeviceLatentBackend, LatentBackend, LatentImpl
from kvcompress.serving.vllm.metadata import DeviceBuilder
from tests.ops import emulated
from tests.serving.vllm import engines
from tests.serving.vllm.no_waits import NoWaits

HEADS, CHANNELS, RANK, BLOCK = 4, 48, 32, 16
LONGEST = 320


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    return emulated.count_as_gpu(monkeypatch)


def serving(dtype: torch.dtype = torch.bfloat16) -> compat.Engine:
    return engines.engine(max_model_len=LONGEST, dtype=dtype)


def codec(channels: int = CHANNELS) -> LatentCodec:
    return LatentCodec(LatentSpec(channels, RANK, 2))


def test_the_kernels_attend_what_they_cover(kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert latent.backend_for(codec(), serving(dtype)) is DeviceLatentBackend
    assert latent.backend_for(codec(), serving(torch.float32)) is LatentBackend
    assert latent.backend_for(codec(CHANNELS + 8), serving()) is LatentBackend
    assert latent.backend_for(codec(4096), serving()) is LatentBackend
    monkeypatch.setattr(gpu, "kernels", lambda device: None)
    assert latent.backend_for(codec(), serving()) is LatentBackend


def test_names_and_parts() -> None:
    names = {DeviceLatentBackend.get_name(), LatentBackend.get_name()}
    assert len(names) == 2 or names == {"CUSTOM"}
    assert DeviceLatentBackend.get_builder_cls() is DeviceBuilder


def test_a_cache_of_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="--kv-cache-dtype fp8; the latent is cached in the model's dtype"):
        latent.check(engines.engine(cache_dtype="fp8"), CodecSpec(()))


class Runner:
    """One layer and the tensors that vLLM's runner keeps: those of the device, and the host's copies."""

    def __init__(self) -> None:
        self.impl = LatentImpl(HEADS, CHANNELS, CHANNELS**-0.5, 1, codec=codec(), engine=serving())
        self.generator = torch.Generator().manual_seed(5)
        columns = LONGEST // BLOCK
        self.cache = torch.full((1 + 3 * columns, 1, BLOCK, CHANNELS), torch.nan, dtype=torch.bfloat16)
        self.tables = (1 + torch.randperm(3 * columns, generator=self.generator)).view(3, columns).int()
        self.history = [self.draw(0, 1) for _ in range(3)]
        self.builder = DeviceBuilder(None, ["layer"], None, torch.device("cpu"))

    def draw(self, tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, CHANNELS, generator=self.generator).bfloat16()

    def step(self, counts: list[int], padding: int = 0) -> None:
        """New tokens of every request; output checked against torch on the same pages."""
        total = sum(counts)
        query_THC, key_T1C = self.draw(total + padding, HEADS), self.draw(total + padding, 1)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        slots = torch.full((total + padding,), -1)
        for request, (start, count) in enumerate(zip(starts.tolist(), counts, strict=False)):
            positions = len(self.history[request]) + torch.arange(count)
            blocks = self.tables[request].long()[positions // BLOCK]
            slots[start : start + count] = blocks * BLOCK + positions % BLOCK
            self.history[request] = torch.cat([self.history[request], key_T1C[start : start + count]])
        lengths = torch.tensor([len(tokens) for tokens in self.history], dtype=torch.int32)
        host_starts, bounds = starts.clone(), lengths.clone()
        host = {"query_start_loc_cpu": host_starts, "seq_lens_cpu_upper_bound": bounds}
        batch = engines.batch(starts, lengths, slots, self.tables, max(counts), **host)
        output_THR = torch.full((total + padding, HEADS, RANK), torch.nan, dtype=torch.bfloat16)
        with NoWaits(host_starts, bounds):
            step = self.builder.describe(compat.Batch.of(batch))
            self.impl.forward(None, query_THC, key_T1C, key_T1C, self.cache, step, output_THR)
        expected_THR = torch.zeros(total, HEADS, RANK)
        numbers = (self.tables, starts.tolist(), lengths.tolist(), CHANNELS**-0.5)
        LatentOp().attend(Call(expected_THR, query_THC.float(), *numbers), self.cache[:, 0].float())
        assert relative_error(output_THR[:total].float(), expected_THR.double()) < 4e-3
        assert bool(self.cache[0].isnan().all()), "padding was stored"


@pytest.mark.usefixtures("kernels")
def test_mixed_batches_without_waiting_for_the_device() -> None:
    runner = Runner()
    for counts, padding in (([20, 70, 3], 0), ([1, 1, 1], 2), ([1, 66, 5], 0), ([4, 4, 4], 1)):
        runner.step(counts, padding)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("tokens", "multiprocessors"), [(64, 132), (600, 24)])
def test_the_profiling_run_reserves_what_steps_take(
    tokens: int, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: multiprocessors)
    cuda_latent._workspace_bytes.cache_clear()
    impl = LatentImpl(HEADS, CHANNELS, 1.0, 1, codec=codec(), engine=serving())
    reserved = impl.workspace_bytes(torch.empty(tokens, HEADS, RANK))
    cuda_latent._workspace_bytes.cache_clear()
    taken = 0
    for requests in range(1, tokens + 1):
        for rows, queries in ((requests, 1), (1, requests)):
            splits = cuda_latent.choose_splits(rows, queries * HEADS, LONGEST, multiprocessors)
            taken = max(taken, 4 * splits * requests * HEADS * (RANK + 1) if splits > 1 else 0)
    assert 0.9 * taken <= reserved <= 1.1 * taken
