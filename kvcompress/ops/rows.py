"""Tensors as kernels read them: rows of numbers, and numbers of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.ops import interface

Numbers = Tensor | Sequence[int]
"""Of a batch, on the host or on the device."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the types kernels read and write (kvc_dtype)."""


def rows_struct(rows_THD: Tensor) -> interface.Rows:
    """The C description of rows of float32, bfloat16 or float16 numbers, those of a row side by side."""
    assert rows_THD.stride(-1) == 1, rows_THD.stride()
    assert rows_THD.dtype in DTYPES, rows_THD.dtype
    return interface.Rows(rows_THD.data_ptr(), rows_THD.stride(0), rows_THD.stride(1), DTYPES[rows_THD.dtype])


def int32_rows(numbers: Numbers, device: torch.device | str = "cpu") -> Tensor:
    """Numbers as kernels read them: int32, those of a row side by side."""
    if not isinstance(numbers, Tensor):
        return torch.tensor(numbers, dtype=torch.int32, device=device)
    found = numbers.to(device=device, dtype=torch.int32)
    return found if found.stride(-1) == 1 else found.contiguous()


def host_list(numbers: Numbers) -> Sequence[int]:
    """Numbers as the torch code loops over them."""
    return numbers.tolist() if isinstance(numbers, Tensor) else numbers
