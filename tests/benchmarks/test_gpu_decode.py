"""`make gpu` on a machine without a GPU, and how ncu's output is read."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_decode
from benchmarks.gpu import blocks, check, latents, profile, shared, sweep
from kvcompress.ops.blocks.cuda import CudaBlocks
from kvcompress.ops.call import Call
from kvcompress.ops.heads.cuda import CudaHeads
from kvcompress.ops.latent.cuda import CudaLatent
from kvcompress.ops.shared.call import SharedCall
from kvcompress.ops.shared.cuda import CudaShared
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
    emulated.count_as_gpu(monkeypatch)
    for module in (blocks, check, latents, shared, sweep):
        monkeypatch.setattr(module, "DEVICE", "cpu")


@pytest.mark.usefixtures("on_device")
def test_checks_pass_on_the_emulation() -> None:
    assert check.failures(small=True) == {}


@pytest.mark.usefixtures("on_device")
def test_checks_fail_on_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CudaHeads.attend_latents
    monkeypatch.setattr(CudaHeads, "attend_latents", lambda *args: tuple(1.02 * x for x in right(*args)))
    every = check.checks
    monkeypatch.setattr(check, "checks", lambda small: (item for item in every(small) if "attention" in item[0]))
    assert len(check.failures(small=True)) == 3


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("instance", ["16", "4 outliers 1", "bands 3.5/2.75", "rank 64 in 4"])
def test_steps_of_the_sweep(monkeypatch: pytest.MonkeyPatch, instance: str) -> None:
    monkeypatch.setattr(sweep, "COLD_BYTES", 1)
    cache = sweep.Cache(instance, 128, 1)
    assert cache.bytes == cache.pages[0].numel()
    absorbed_THR = torch.randn(1, sweep.HEADS, cache.spec.k.rank)
    mixed_THR, _ = cache.op.attend_latents(cache.call(1), absorbed_THR, cache.pages[0])
    assert mixed_THR.isfinite().all()
    sweep.kernel_step(cache, 1)(0)
    sweep.whole_step(cache, 1)(0)


@pytest.mark.usefixtures("on_device")
def test_checks_of_latents_fail_on_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CudaLatent.attend

    def wrong(op: CudaLatent, call: Call, *args: Any) -> None:
        right(op, call, *args)
        call.output_THD *= 1.02

    monkeypatch.setattr(CudaLatent, "attend", wrong)
    monkeypatch.setattr(check, "checks", latents.checks)
    assert len(check.failures(small=True)) == 4


@pytest.mark.usefixtures("on_device")
def test_measuring_latents(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every step once, in the place of its time."""
    monkeypatch.setattr(latents, "COLD_BYTES", 1)

    def once(step: Callable[[int], None], copies: int) -> list[float]:
        step(0)
        return [2.0]

    monkeypatch.setattr(latents, "microseconds", once)
    rows = latents.measure(16, 64, 2)
    assert [row["method"] for row in rows if "us" in row][:2] == ["latents", "append"]
    assert "torch sdpa math" in [row["method"] for row in rows if "us" in row]
    latents.print_rows(rows, 1e12)
    # 2 * 64 * 1152 bytes in 2 us at 1e12 bytes per second; 2 * 16 * 64 * 2 * 1088 products' halves.
    assert "latents                              2.0         7.4       2.2        1.00x" in capsys.readouterr().out


@pytest.mark.usefixtures("on_device")
def test_checks_of_shared_latents_fail_on_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CudaShared.attend_few

    def wrong(op: CudaShared, call: SharedCall, *args: Any) -> None:
        right(op, call, *args)
        call.output_THD *= 1.02

    monkeypatch.setattr(CudaShared, "attend_few", wrong)
    every = shared.checks
    monkeypatch.setattr(check, "checks", lambda small: (item for item in every(small) if "attention" in item[0]))
    assert len(check.failures(small=True)) == 2


@pytest.mark.usefixtures("on_device")
def test_measuring_shared_latents(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every step once, in the place of its time."""
    monkeypatch.setattr(shared, "COLD_BYTES", 1)

    def once(step: Callable[[int], None], copies: int) -> list[float]:
        step(0)
        return [2.0]

    monkeypatch.setattr(shared, "microseconds", once)
    row = shared.measure("4", 64, 1)
    shared.print_row(row, 1e12)
    # 4 * 64 * (50 + 74) bytes in 2 us at 1e12 bytes per second; 2 * 64 * 384 * 1024 products.
    assert "2.0 us, 1.6 % of read, 25.2 TFLOP/s; store 2.0 us" in capsys.readouterr().out


@pytest.mark.usefixtures("on_device")
def test_checks_of_blocks_fail_on_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CudaBlocks.attend_blocks
    monkeypatch.setattr(CudaBlocks, "attend_blocks", lambda *args: tuple(1.02 * x for x in right(*args)))
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
        latents = cache.op.plan.codec.open(cache.pages[0][:, :, 0])
        assert all(1 < float(latent.abs().mean()) < 20 for latent in latents)
        blocks.kernel_step(cache, 1)(0)
        blocks.whole_step(cache, 1)(0)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("form", gpu_decode.FORMS)
def test_every_form_is_measured_and_shown(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last method, every step once in the place of its time."""

    def once(step: Callable[[int], None], copies: int) -> list[float]:
        step(0)
        return [2.0]

    for module in (blocks, latents, shared, sweep):
        monkeypatch.setattr(module, "COLD_BYTES", 1)
    for module in (latents, shared, sweep):
        monkeypatch.setattr(module, "microseconds", once)
    monkeypatch.setattr(blocks, "seal_microseconds", lambda cache, batch: 2.0)
    assert check.FORMS.keys() == set(gpu_decode.FORMS)
    name, measure = gpu_decode.measures(form)[-1]
    rows = [{"form": form} | row for row in measure(64, 1)]
    assert rows
    gpu_decode.show(form, rows, 1e12)
    shown = capsys.readouterr().out
    assert (name if form != "latents" else "128 heads") in shown
    assert "nan" not in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the checks would pass")
def test_what_a_forms_checks_say_is_passed_on() -> None:
    assert "CUDA" in gpu_decode.complaint("latents")
