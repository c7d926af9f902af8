"""Whether the numbers of a checkpoint are numbers: one NaN in a weight makes everything after it NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kvcompress.checkpoint.hashing import CHUNK_BYTES
from kvcompress.checkpoint.paths import quote
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.safetensors_file import TensorInfo

_EXPONENTS: dict[str, tuple[np.dtype[Any], int]] = {
    "F64": (np.dtype("<u8"), 0x7FF0_0000_0000_0000),
    "F32": (np.dtype("<u4"), 0x7F80_0000),
    "F16": (np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80),
    "F8_E5M2": (np.dtype("u1"), 0x7C),
    "F8_E4M3": (np.dtype("u1"), 0x7F),
}
"""By dtype, the bits that are all set in what is not finite, as an unsigned integer of the element's size."""


def check_finite(checkpoint: Checkpoint, progress: Callable[[int], None] | None = None) -> None:
    """Read every floating-point tensor once.

    Args:
        progress: called with the number of bytes read since the last call.

    Raises:
        ValueError: naming the first tensor with an infinity or a NaN.
    """
    for info in checkpoint.tensors.values():
        if info.dtype in _EXPONENTS and (count := _not_finite(checkpoint, info)):
            raise ValueError(
                f"{checkpoint.path}: {quote(info.name)} holds {count:,} values that are infinite or not a number, of "
                f"{info.nbytes // _EXPONENTS[info.dtype][0].itemsize:,}; download the checkpoint again, or repair it"
            )
        if progress:
            progress(info.nbytes)


def _not_finite(checkpoint: Checkpoint, info: TensorInfo) -> int:
    kind, mask = _EXPONENTS[info.dtype]
    left, count = info.nbytes // kind.itemsize, 0
    with open(checkpoint.file(info.file), "rb") as file:
        file.seek(info.offset)
        while left and len(bits := np.fromfile(file, kind, min(left, CHUNK_BYTES // kind.itemsize))):
            left -= len(bits)
            count += int(np.count_nonzero((bits & kind.type(mask)) == mask))
    return count
