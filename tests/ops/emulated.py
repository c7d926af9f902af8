"""The CUDA kernels without a GPU: their own source, compiled by the C++ compiler after csrc/emulator/emulate.h.

Two libraries, one for each way of copying pages: by lanes as on sm_80, by the copy engine as on sm_90.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from torch import Tensor

from benchmarks.cases.heads import Cache
from kvcompress.codec.heads import fragment
from kvcompress.codec.layout import FRAGMENT
from kvcompress.ops import cuda_library, gpu
from kvcompress.ops.heads import cuda
from kvcompress.ops.heads.reference import HeadsOp

ROOT = Path(__file__).parents[2]
COPIES = {"sm_80": 0, "sm_90": 1}


@functools.cache
def library(copies: str) -> ctypes.CDLL | None:
    """None without a C++ compiler. Kept among temporary files under a name made of the sources."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-DKVC_BULK_COPIES={COPIES[copies]}", "-Icsrc", "-Icsrc/include"]
    flags += ["-include", "emulator/emulate.h"]
    files = sorted(file for file in (ROOT / "csrc").rglob("*") if file.suffix in (".cu", ".h"))
    digest = sha256(b"".join(file.read_bytes() for file in files) + " ".join([compiler, *flags]).encode()).hexdigest()
    path = Path(tempfile.gettempdir(), f"kvcompress-emulated-{os.getuid()}", f"{digest[:24]}.so")
    if not path.is_file():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            made = Path(directory, "library.so")
            sources = [str(file) for file in files if file.suffix == ".cu"]
            subprocess.run([compiler, *flags, "-x", "c++", *sources, "-o", str(made)], check=True, cwd=ROOT)
            made.replace(path)
    return cuda_library.open_library(path)


def count_as_gpu(monkeypatch: pytest.MonkeyPatch, copies: str = "sm_90") -> ctypes.CDLL:
    """Have operations take all memory for a GPU's and call the emulated kernels; skip without a C++ compiler."""
    found = library(copies)
    if found is None:
        pytest.skip("no C++ compiler to emulate the CUDA kernels with")
    monkeypatch.setattr(gpu, "kernels", lambda device: found)
    return found


def to_fragment(cache: Cache, op: HeadsOp) -> Cache:
    """The same cache as an operation on fragment order reads it; what was poison still is."""
    assert op.order == FRAGMENT
    pages_NHX = fragment.to_fragment(cache.pages_NHX, cache.codec.spec, cache.layout.block_size)
    return replace(cache, op=op, pages_NHX=pages_NHX)


def attend(
    found: ctypes.CDLL,
    cache: Cache,
    query_THD: Tensor,
    query_lens: list[int],
    splits: int = 1,
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and lse of the emulated kernels on a cache in token-major order."""
    assert cuda.covers(found, cache.codec.spec)
    cache = to_fragment(cache, cuda.CudaHeads(found, cache.codec))
    return cache.attend(query_THD, query_lens, softmax_scale, max_query_len=max(query_lens), splits=splits)
