"""The compiled library: where it is, its C interface (csrc/include/kvcompress/cpu.h), and what this machine runs."""

from __future__ import annotations

import ctypes
import functools
import os
import sysconfig
import warnings
from pathlib import Path

ABI_VERSION = 4
MAX_BANDS = 4
MAX_HEAD_DIM = 512
MAX_LOW_RANK = 32
MAX_LATENT_CHANNELS = 4096
LEVELS = ("portable", "avx2", "avx512", "avx512vnni")
"""Instruction-set levels, each faster than the one before."""

PATH_VARIABLE = "KVCOMPRESS_LIBRARY"
"""Environment variable: the library to load instead of the installed one; empty turns compiled kernels off."""

LEVEL_VARIABLE = "KVCOMPRESS_CPU_LEVEL"
"""Environment variable: the highest level to use, one of LEVELS."""

_FILE = "libkvcompress_cpu.so"


class Side(ctypes.Structure):
    _fields_ = (
        ("rank", ctypes.c_int32),
        ("num_bands", ctypes.c_int32),
        ("outliers", ctypes.c_int32),
        ("bits", ctypes.c_int32 * MAX_BANDS),
        ("widths", ctypes.c_int32 * MAX_BANDS),
        ("steps", ctypes.c_float * MAX_BANDS),
        ("gain_offset", ctypes.c_int64),
        ("outlier_offset", ctypes.c_int64),
        ("channel_offset", ctypes.c_int64),
        ("code_offset", ctypes.c_int64),
        ("code_bytes", ctypes.c_int64),
    )


class Pages(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("k", Side),
        ("v", Side),
    )


class Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


class AttendArgs(ctypes.Structure):
    _fields_ = (
        ("pages", Pages),
        ("query", Rows),
        ("output", Rows),
        ("lse_TH", ctypes.c_void_p),
        ("k_decode_HDR", ctypes.c_void_p),
        ("k_mean_HD", ctypes.c_void_p),
        ("v_decode_HRD", ctypes.c_void_p),
        ("v_mean_HD", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("query_starts", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("num_requests", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("softmax_scale", ctypes.c_float),
        ("split_tokens", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("level", ctypes.c_int32),
    )


class AppendArgs(ctypes.Structure):
    _fields_ = (
        ("pages", Pages),
        ("keys", Rows),
        ("values", Rows),
        ("slots", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("k_mean_HD", ctypes.c_void_p),
        ("k_encode_HDR", ctypes.c_void_p),
        ("k_weight_HR", ctypes.c_void_p),
        ("v_mean_HD", ctypes.c_void_p),
        ("v_encode_HDR", ctypes.c_void_p),
        ("v_weight_HR", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("level", ctypes.c_int32),
    )


class BlockSide(ctypes.Structure):
    _fields_ = (
        ("rank", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("low_rank", ctypes.c_int32),
        ("outliers", ctypes.c_int32),
        ("nbytes", ctypes.c_int32),
        ("code_offset", ctypes.c_int64),
        ("scale_offset", ctypes.c_int64),
        ("zero_offset", ctypes.c_int64),
        ("token_offset", ctypes.c_int64),
        ("channel_offset", ctypes.c_int64),
        ("value_offset", ctypes.c_int64),
        ("place_offset", ctypes.c_int64),
    )


class BlockPages(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("record_bytes", ctypes.c_int64),
        ("block_size", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("k", BlockSide),
        ("v", BlockSide),
    )


class Rings(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("num_rings", ctypes.c_int64),
        ("ring_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("places", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


class BlockAttendArgs(ctypes.Structure):
    _fields_ = (
        ("pages", BlockPages),
        ("rings", Rings),
        ("query", Rows),
        ("keys", Rows),
        ("values", Rows),
        ("output", Rows),
        ("lse_TH", ctypes.c_void_p),
        ("k_decode_HDR", ctypes.c_void_p),
        ("k_mean_HD", ctypes.c_void_p),
        ("v_decode_HRD", ctypes.c_void_p),
        ("v_mean_HD", ctypes.c_void_p),
        ("ring_of", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("query_starts", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("num_requests", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("softmax_scale", ctypes.c_float),
        ("split_tokens", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("level", ctypes.c_int32),
    )


_STATUS = {
    1: "a block table, slot or ring names a block outside the cache",
    2: "a shape the kernels do not cover",
    3: "a request has fewer tokens than queries, or more than its row of the block table holds",
    4: "no memory for temporary arrays",
}


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


def check(status: int) -> None:
    """Raise ValueError for a kernel's status that is not success."""
    if status:
        raise ValueError(f"work on compressed pages failed: {_STATUS[status]}")
