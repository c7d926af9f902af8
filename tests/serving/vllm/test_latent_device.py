"""MLA latents in vLLM on a GPU: the kernels' emulation, batches as vLLM's runner describes them there."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import require

require.need("vllm")

from kvcompress.ops import gpu
from kvcompress.ops.latent import cuda as cuda_latent
from kvcompress.ops.latent import reference as latent_reference
from kvcompress.serving.vllm import compat
from kvcompress.serving.vllm import latent as latent_backend
from kvcompress.serving.vllm.device_backend import DeviceMetadataBuilder
from kvcompress.serving.vllm.latent import DeviceLatentBackend, LatentAttentionBackend
from tests.ops import emulated
from tests.ops.heads.cases import relative_error
from tests.serving.vllm.no_waits import NoWaits

HEADS, CHANNELS, RANK, BLOCK = 4, 48, 32, 16
LONGEST = 320


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    found = emulated.count_as_gpu(monkeypatch)
    monkeypatch.setattr(
        compat,
        "get_current_vllm_config",
        lambda: SimpleNamespace(model_config=SimpleNamespace(max_model_len=LONGEST)),
    )
    return found


CONFIG: Any = SimpleNamespace(device_config=SimpleNamespace(device_type="cuda"))


def test_the_kernels_attend_what_they_cover(kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert latent_backend.backend_for(CHANNELS, dtype, CONFIG) is DeviceLatentBackend
    assert latent_backend.backend_for(CHANNELS, torch.float32, CONFIG) is LatentAttentionBackend
    assert latent_backend.backend_for(CHANNELS + 8, torch.bfloat16, CONFIG) is LatentAttentionBackend
    assert latent_backend.backend_for(4096, torch.bfloat16, CONFIG) is LatentAttentionBackend
    monkeypatch.setattr(gpu, "kernels", lambda device: None)
    assert latent_backend.backend_for(CHANNELS, torch.bfloat16, CONFIG) is LatentAttentionBackend


def test_names_and_parts() -> None:
    names = {DeviceLatentBackend.get_name(), LatentAttentionBackend.get_name()}
    assert len(names) == 2 or names == {"CUSTOM"}
    assert DeviceLatentBackend.get_builder_cls() is DeviceMetadataBuilder


class Runner:
    """One layer and the tensors that vLLM's runner keeps: those of the device, and the host's copies."""

    def __init__(self) -> None:
        self.impl: Any = DeviceLatentBackend.get_impl_cls()(HEADS, CHANNELS, CHANNELS**-0.5, 1)
        self.generator = torch.Generator().manual_seed(5)
        columns = LONGEST // BLOCK
        self.cache = torch.full((1 + 3 * columns, 1, BLOCK, CHANNELS), torch.nan, dtype=torch.bfloat16)
        self.tables = (1 + torch.randperm(3 * columns, generator=self.generator)).view(3, columns).int()
        self.history = [self.draw(0, 1) for _ in range(3)]
        self.builder = DeviceMetadataBuilder(None, ["layer"], None, torch.device("cpu"))

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
        batch = SimpleNamespace(
            causal=True,
            num_reqs=3,
            num_actual_tokens=total + padding,
            max_query_len=max(counts),
            slot_mapping=slots,
            block_table_tensor=self.tables,
            query_start_loc=starts,
            query_start_loc_cpu=host_starts,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=bounds,
        )
        output_THR = torch.full((total + padding, HEADS, RANK), torch.nan, dtype=torch.bfloat16)
        with NoWaits(host_starts, bounds):
            self.impl.forward(None, query_THC, key_T1C, key_T1C, self.cache, self.builder.describe(batch), output_THR)
        expected_THR = torch.zeros(total, HEADS, RANK)
        latent_reference.attend(
            expected_THR,
            query_THC.float(),
            self.cache[:, 0].float(),
            self.tables,
            starts.tolist(),
            lengths.tolist(),
            CHANNELS**-0.5,
        )
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
    cuda_latent.workspace_bytes.cache_clear()
    impl = DeviceLatentBackend.get_impl_cls()(HEADS, CHANNELS, 1.0, 1)
    reserved = impl._workspace(torch.empty(tokens, HEADS, RANK))
    cuda_latent.workspace_bytes.cache_clear()
    taken = 0
    for requests in range(1, tokens + 1):
        for rows, queries in ((requests, 1), (1, requests)):
            splits = cuda_latent.choose_splits(rows, queries * HEADS, LONGEST, multiprocessors)
            taken = max(taken, 4 * splits * requests * HEADS * (RANK + 1) if splits > 1 else 0)
    assert 0.9 * taken <= reserved <= 1.1 * taken
