"""The CUDA kernels, compiled for the GPU at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from kvcompress.ops import cuda_library

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "gpu"


def build() -> Path:
    """The library, newly built with cmake or, without it, with nvcc alone.

    Raises:
        ValueError: there is no nvcc, or it refuses the sources.
    """
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise ValueError("found no nvcc; put the CUDA toolkit's bin directory on the PATH")
    BUILD.mkdir(parents=True, exist_ok=True)
    # Kernels of sm_80 run on 8.x; those of sm_90 use the copy engine.
    architecture = "90" if torch.cuda.get_device_capability()[0] >= 9 else "80"
    if shutil.which("cmake"):
        options = [
            "-DKVCOMPRESS_CUDA=ON",
            f"-DCMAKE_CUDA_ARCHITECTURES={architecture}",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
        ]
        _run(["cmake", "-S", str(ROOT), "-B", str(BUILD), *options])
        _run(["cmake", "--build", str(BUILD), "--parallel", str(os.cpu_count()), "--target", "kvcompress_cuda"])
        return BUILD / "libkvcompress_cuda.so"
    csrc = ROOT / "csrc"
    flags = ["-std=c++17", f"-arch=sm_{architecture}", "-Xcompiler", "-fPIC", f"-I{csrc}", f"-I{csrc / 'include'}"]
    objects = {source: BUILD / f"{source.parent.name}_{source.stem}.o" for source in csrc.glob("cuda/*/*.cu")}
    # Encoders' bytes are the reference's.
    own = {source: ["-fmad=false"] if source.stem == "encode" else [] for source in objects}
    target = BUILD / "libkvcompress_cuda.so"
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        commands = ([nvcc, *flags, *own[cu], "-c", str(cu), "-o", str(made)] for cu, made in objects.items())
        list(threads.map(_run, commands))
    _run([nvcc, *flags, "-shared", *map(str, objects.values()), "-o", str(target)])
    return target


def use(path: Path) -> None:
    """Make kvcompress load this library, here and in processes started from here."""
    os.environ[cuda_library.PATH_VARIABLE] = str(path)
    cuda_library.load.cache_clear()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
