"""`make gpu` on a machine without a GPU, and how ncu's output is read."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import blocks, check, profile, sweep
from kvcompress.codec.layout import PageLayout
from kvcompress.ops import cuda, cuda_blocks
from kvcompress.ops.block_plan import BlockPlan
from kvcompress.ops.plan import LayerPlan
from tests.ops import emulated

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu would run")
def test_without_a_gpu_one_sentence_and_code_2() -> None:
    planned = ["make", "--dry-run", "--no-print-directory", "gpu", f"PYTHON={sys.executable}"]
    recipe = subprocess.run(planned, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    done = subprocess.run(recipe, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == (
        "error: found no NVIDIA GPU of compute capability 8.0 or newer that torch can use; run make gpu on one\n"
    )
    assert done.returncode == 2
    assert not done.stdout


def test_metrics_of_ncu() -> None:
    text = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","dram__bytes_read.sum","launch__registers_per_thread"\n'
        '"","","Mbyte","register/thread"\n'
        '"0","decode","512.3","128"\n'
    )
    assert profile.metrics(text) == {
        "dram__bytes_read.sum": "512.3 Mbyte",
        "launch__registers_per_thread": "128 register/thread",
    }
    assert profile.metrics("==ERROR== no permission\n") == {}


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels by emulation, tensors on the CPU."""
    found = emulated.library("sm_90")
    if found is None:
        pytest.skip("no C++ compiler to emulate the CUDA kernels with")

    def library_for(pages_NHX: Tensor, layout: PageLayout, plan: LayerPlan, *rows: Tensor) -> ctypes.CDLL | None:
        return found if cuda.covered(layout, plan) else None

    def library_for_blocks(pages_NHMB: Tensor, plan: BlockPlan, *rows: Tensor) -> ctypes.CDLL | None:
        return found if cuda_blocks.covered(plan, pages_NHMB.shape[2]) else None

    monkeypatch.setattr(cuda, "library_for", library_for)
    monkeypatch.setattr(cuda_blocks, "library_for", library_for_blocks)
    monkeypatch.setattr(cuda_blocks, "keeping_library_for", lambda *rows: found)
    for module in (blocks, check, sweep):
        monkeypatch.setattr(module, "DEVICE", "cpu")


@pytest.mark.usefixtures("on_device")
def test_checks_pass_on_the_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    every = check.checks
    monkeypatch.setattr(check, "checks", lambda small: (item for item in every(small) if "graph" not in item[0]))
    assert check.failures(small=True) == {}


@pytest.mark.usefixtures("on_device")
def test_checks_fail_on_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cuda.attend_latents
    monkeypatch.setattr(cuda, "attend_latents", lambda *args: tuple(1.02 * x for x in right(*args)))
    every = check.checks
    monkeypatch.setattr(check, "checks", lambda small: (item for item in every(small) if "attention" in item[0]))
    assert len(check.failures(small=True)) == 3


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("instance", ["16", "4 outliers 1", "bands 3.5/2.75", "rank 64 in 4"])
def test_steps_of_the_sweep(monkeypatch: pytest.MonkeyPatch, instance: str) -> None:
    monkeypatch.setattr(sweep, "COLD_BYTES", 1)
    cache = sweep.Cache(instance, 128, 1)
    assert cache.bytes == cache.pages[0].numel()
    library = cuda.library_for(cache.pages[0], cache.layout, cache.plan)
    assert library is not None
    mixed_THR, _ = cuda.attend_latents(
        library,
        torch.randn(1, sweep.HEADS, cache.plan.k.spec.rank),
        cache.pages[0],
        cache.layout,
        cache.plan,
        cache.table_RN,
        cache.starts_R,
        cache.lengths_R,
        0.1,
        1,
    )
    assert mixed_THR.isfinite().all()
    sweep.kernel_step(cache, 1)(0)
    sweep.whole_step(cache, 1)(0)


@pytest.mark.usefixtures("on_device")
def test_checks_of_blocks_fail_on_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cuda_blocks.attend_blocks
    monkeypatch.setattr(cuda_blocks, "attend_blocks", lambda *args: tuple(1.02 * x for x in right(*args)))
    [(_, attention), (_, stored), *_] = blocks.checks(small=True)
    for check_of_blocks in (attention, stored):
        with pytest.raises(AssertionError):
            check_of_blocks()


@pytest.mark.usefixtures("on_device")
def test_steps_of_the_sweep_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "COLD_BYTES", 1)
    for instance in ("gear 4", "gear 2 without outliers"):
        cache = blocks.Cache(instance, 192, 1)
        assert cache.bytes == cache.pages[0].numel()
        latents = cache.plan.codec.open(cache.pages[0][:, :, 0])
        assert all(1 < float(latent.abs().mean()) < 20 for latent in latents)
        blocks.kernel_step(cache, 1)(0)
        blocks.whole_step(cache, 1)(0)
