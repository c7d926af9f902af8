"""What a test needs of the machine. Where it is missing the test skips; where KVCOMPRESS_REQUIRE names it, it fails.

KVCOMPRESS_REQUIRE is a list with commas of the names in `NEEDS`, or `all`. `.ci/run` names what its machine has, so
that a compiler or a package that went missing there is an error and not hundreds of tests fewer.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from kvcompress_eval.report.browser import find_browser

from kvcompress.ops import library

VARIABLE = "KVCOMPRESS_REQUIRE"
ALL = "all"
CUDA_TOOLKIT = Path("/usr/local/cuda/bin")
LEVELS = library.LEVELS[1:]
"""Instruction sets beyond what every machine has."""


def compiler() -> str | None:
    """The C++ compiler that emulates the CUDA kernels."""
    return shutil.which("c++") or shutil.which("g++")


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(CUDA_TOOLKIT))


def cuobjdump() -> str | None:
    """Of the toolkit, of the package nvidia-cuda-cuobjdump, or the one triton brings along."""
    places = [CUDA_TOOLKIT]
    for package, folder in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        found = importlib.util.find_spec(package)
        places += [Path(place, folder) for place in (found and found.submodule_search_locations) or ()]
    found_ones = (shutil.which("cuobjdump", path=str(place)) for place in places)
    return shutil.which("cuobjdump") or next(filter(None, found_ones), None)


def _package(name: str) -> Callable[[], bool]:
    return lambda: importlib.util.find_spec(name) is not None


def _level(number: int) -> Callable[[], bool]:
    return lambda: library.load() is not None and library.level() >= number


NEEDS: dict[str, tuple[Callable[[], object], str]] = {
    "compiler": (compiler, "no C++ compiler to emulate the CUDA kernels with"),
    "nvcc": (nvcc, "no nvcc, so the CUDA kernels are not compiled here (the emulation still runs them)"),
    "cuobjdump": (cuobjdump, "no cuobjdump (pip install nvidia-cuda-cuobjdump), so instructions cannot be looked at"),
    "gpu": (torch.cuda.is_available, "no GPU (the emulation runs the kernels' source instead)"),
    "kernels": (library.load, f"no compiled kernels; build them with cmake and set {library.PATH_VARIABLE}"),
    **{name: (_level(number), f"this machine has no {name}") for number, name in enumerate(LEVELS, 1)},
    "readelf": (lambda: shutil.which("readelf"), "no readelf to look into the library with"),
    "browser": (find_browser, "no Chromium is installed"),
    "root": (lambda: os.geteuid() == 0, "not the root, who alone can mount a small disk"),
    "vllm": (_package("vllm"), "vLLM is not installed: pip install 'kvcompress[vllm]'"),
    "lm_eval": (_package("lm_eval"), "lm_eval is not installed: pip install 'lm_eval[api]'"),
    "datasets": (_package("datasets"), "datasets is an optional dependency: pip install 'kvcompress[longbench]'"),
    "jieba": (_package("jieba"), "jieba is an optional dependency: pip install 'kvcompress[longbench]'"),
}
"""What tells that something is there, and what is said where it is not."""


def required() -> set[str]:
    """What must be there.

    Raises:
        ValueError: KVCOMPRESS_REQUIRE names what no test needs.
    """
    named = {name for name in os.environ.get(VARIABLE, "").split(",") if name}
    if unknown := named - {*NEEDS, ALL}:
        raise ValueError(
            f"found {VARIABLE} with {', '.join(sorted(unknown))}; expected {ALL} or some of {', '.join(NEEDS)}"
        )
    return set(NEEDS) if ALL in named else named


def need(*names: str) -> None:
    """Skip or fail the test, the fixture's tests or the module that this is called in, unless all of these are there.

    A package that is installed and cannot be imported is there: its tests fail.
    """
    for name in names:
        found, words = NEEDS[name]
        if not found():
            missing(name, words)


def missing(name: str, words: str) -> NoReturn:
    """As `need`, of what was looked for already."""
    if name in required():
        pytest.fail(f"{words}; {VARIABLE} names {name}", pytrace=False)
    pytest.skip(words, allow_module_level=True)
