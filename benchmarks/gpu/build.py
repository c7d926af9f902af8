"""The CUDA kernels, compiled for the GPU at hand."""

from __future__ import annotations

import os
import re
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
    flags = ["-std=c++17", f"-arch=sm_{architecture}", "-Xcompiler", "-fPIC", "-I", str(ROOT / "csrc" / "include")]
    sources = ROOT / "csrc" / "cuda"
    parts = [("encode", ["-fmad=false"]), ("store", ["-fmad=false"])]  # whose bytes are the reference's
    parts += [(name, []) for name in ("api", "blocks", "latent", "shared")]
    instances = re.findall(r"X\((\d+), (\d+)\)", (sources / "instances.h").read_text())
    parts += [("decode", [f"-DKVC_K_BITS={k}", f"-DKVC_V_BITS={v}"]) for k, v in instances]
    target, objects = BUILD / "libkvcompress_cuda.so", [BUILD / f"{number}.o" for number in range(len(parts))]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        commands = [
            [nvcc, *flags, *own, "-c", str(sources / f"{name}.cu"), "-o", str(made)]
            for (name, own), made in zip(parts, objects, strict=True)
        ]
        list(threads.map(_run, commands))
    _run([nvcc, *flags, "-shared", *map(str, objects), "-o", str(target)])
    return target


def use(path: Path) -> None:
    """Make kvcompress load this library, here and in processes started from here."""
    os.environ[cuda_library.PATH_VARIABLE] = str(path)
    cuda_library.load.cache_clear()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
