"""The compiled library of CPU kernels: where it is, and what this machine runs."""

from __future__ import annotations

import ctypes
import functools
import os
import sysconfig
import warnings
from pathlib import Path

import torch

from kvcompress.ops.interface.common import ABI_VERSION, LEVELS, STATUS, Run

PATH_VARIABLE = "KVCOMPRESS_LIBRARY"
"""Environment variable: the library to load instead of the installed one; empty turns compiled kernels off."""

LEVEL_VARIABLE = "KVCOMPRESS_CPU_LEVEL"
"""Environment variable: the highest level to use, one of LEVELS."""

_FILE = "libkvcompress_cpu.so"


def installed(file: str) -> Path:
    """Beside this module; an editable install leaves it among the installed packages instead."""
    places = (Path(__file__).parent, Path(sysconfig.get_path("platlib"), "kvcompress", "ops"))
    return next((place / file for place in places if (place / file).is_file()), places[0] / file)


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, or None (with one warning) where there is none or it is of another version.

    Raises:
        ValueError: KVCOMPRESS_LIBRARY names a file that cannot be loaded.
    """
    chosen = os.environ.get(PATH_VARIABLE)
    path = installed(_FILE) if chosen is None else Path(chosen)
    if chosen == "":
        return None
    if not path.is_file() and chosen is None:
        warnings.warn(
            "kvcompress was installed without its compiled kernels, so attention runs on the slower torch code; "
            "install it with a C++17 compiler on the PATH (pip install --no-binary kvcompress kvcompress), or build "
            f"the library with cmake and name it in {PATH_VARIABLE}",
            stacklevel=2,
        )
        return None
    try:
        library = ctypes.CDLL(str(path))
        found = int(library.kvc_abi_version())
    except (OSError, AttributeError) as error:
        message = f"{path} is not a library of kvcompress kernels ({error}); build it again with cmake"
        raise ValueError(message) from None
    if found != ABI_VERSION:
        warnings.warn(
            f"{path} has kernel interface {found} and this kvcompress needs {ABI_VERSION}, so attention runs on the "
            "slower torch code; build the library again",
            stacklevel=2,
        )
        return None
    return library


def level() -> int:
    """The instruction-set level to use, as an index into LEVELS.

    Raises:
        ValueError: KVCOMPRESS_CPU_LEVEL is not one of LEVELS.
    """
    library = load()
    assert library is not None
    best = int(library.kvc_best_level())
    name = os.environ.get(LEVEL_VARIABLE)
    if not name:
        return best
    if name not in LEVELS:
        raise ValueError(f"{LEVEL_VARIABLE} is {name!r}; expected one of {', '.join(LEVELS)}")
    return min(best, LEVELS.index(name))


def run(split_tokens: int = 0) -> Run:
    """How a call runs on this machine: threads and instructions; `split_tokens` of attention."""
    return _run(torch.get_num_threads(), level(), split_tokens)


@functools.cache
def _run(threads: int, level: int, split_tokens: int) -> Run:
    return Run(threads=threads, level=level, split_tokens=split_tokens)


def check(status: int) -> None:
    """Raise ValueError for a kernel's status that is not success."""
    if status:
        raise ValueError(f"work on compressed pages failed: {list(STATUS.values())[status]}")
