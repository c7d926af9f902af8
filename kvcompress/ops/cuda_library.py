"""The compiled CUDA kernels: where they are and their C interface (csrc/include/kvcompress/cuda.h)."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from pathlib import Path

from kvcompress.ops import interface, library

ABI_VERSION = 2
MAX_RANK = 256

PATH_VARIABLE = "KVCOMPRESS_CUDA_LIBRARY"
"""Environment variable: the library to load instead of the installed one; empty turns the CUDA kernels off."""

_FILE = "libkvcompress_cuda.so"


class AttendArgs(ctypes.Structure):
    _fields_ = (
        ("pages", interface.Pages),
        ("query_THR", ctypes.c_void_p),
        ("output_THR", ctypes.c_void_p),
        ("lse_TH", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("query_starts", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("num_requests", ctypes.c_int32),
        ("max_query_len", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("softmax_scale", ctypes.c_float),
        ("stream", ctypes.c_void_p),
    )


class AppendArgs(ctypes.Structure):
    _fields_ = (
        ("pages", interface.Pages),
        ("keys", interface.Rows),
        ("values", interface.Rows),
        ("slots", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("k_mean_HD", ctypes.c_void_p),
        ("k_encode_HDR", ctypes.c_void_p),
        ("k_weight_HR", ctypes.c_void_p),
        ("v_mean_HD", ctypes.c_void_p),
        ("v_encode_HDR", ctypes.c_void_p),
        ("v_weight_HR", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    )


class GatherArgs(ctypes.Structure):
    _fields_ = (
        ("pages", interface.Pages),
        ("keys_THR", ctypes.c_void_p),
        ("values_THR", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("block_table", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
    )


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
