"""The compiled library of CUDA kernels: where it is."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from pathlib import Path

from kvcompress.ops import library
from kvcompress.ops.interface.common import ABI_VERSION

PATH_VARIABLE = "KVCOMPRESS_CUDA_LIBRARY"
"""Environment variable: the library to load instead of the installed one; empty turns the CUDA kernels off."""

_FILE = "libkvcompress_cuda.so"


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, or None (with one warning) where there is none or it is of another version.

    Raises:
        ValueError: KVCOMPRESS_CUDA_LIBRARY names a file that cannot be loaded.
    """
    chosen = os.environ.get(PATH_VARIABLE)
    if chosen == "":
        return None
    path = library.installed(_FILE) if chosen is None else Path(chosen)
    if not path.is_file() and chosen is None:
        warnings.warn(
            "kvcompress was installed without its CUDA kernels, so attention on this GPU runs on the slower torch "
            "code; install it with nvcc on the PATH and -C cmake.define.KVCOMPRESS_CUDA=ON, or build the library with "
            f"cmake and name it in {PATH_VARIABLE}",
            stacklevel=2,
        )
        return None
    return open_library(path)


def open_library(path: Path) -> ctypes.CDLL | None:
    """A library of these kernels, or None (with a warning) if it is of another version.

    Raises:
        ValueError: it is no such library.
    """
    try:
        found = ctypes.CDLL(str(path))
        version = int(found.kvc_cuda_abi_version())
        found.kvc_cuda_error_text.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        message = f"{path} is not a library of kvcompress CUDA kernels ({error}); build it again with cmake"
        raise ValueError(message) from None
    if version != ABI_VERSION:
        warnings.warn(
            f"{path} has kernel interface {version} and this kvcompress needs {ABI_VERSION}, so attention runs on the "
            "slower torch code; build the library again",
            stacklevel=2,
        )
        return None
    return found


def check(found: ctypes.CDLL, status: int) -> None:
    """Raise for a call that was not a success: ValueError for what the kernels refuse, RuntimeError for the device."""
    if status < 0:
        library.check(-status)
    if status > 0:
        text = found.kvc_cuda_error_text(status)
        raise RuntimeError(f"a CUDA kernel of kvcompress did not start: {text.decode()}")
