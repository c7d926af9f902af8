"""`make gpu` on a machine without a GPU, and how ncu's output is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import profile

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
