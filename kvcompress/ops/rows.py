"""Tensors as kernels read them: rows of numbers, and numbers of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.ops.interface import common
from kvcompress.ops.interface.common import Batch, Rows

Numbers = Tensor | Sequence[int]
"""Of a batch, on the host or on the device."""

DTYPES = {getattr(torch, name): number for number, name in enumerate(common.DTYPES)}
"""Numbers of the types kernels read and write (kvc_dtype)."""


def rows_struct(rows_THD: Tensor) -> Rows:
    """The C description of rows of float32, bfloat16 or float16 numbers, those of a row side by side."""
    assert rows_THD.stride(-1) == 1, rows_THD.stride()
    assert rows_THD.dtype in DTYPES, rows_THD.dtype
    strides = rows_THD.stride()
    return Rows.plain(rows_THD, rows_THD.data_ptr(), strides[0], strides[1], DTYPES[rows_THD.dtype])


def batch_struct(
    query_starts: Tensor,
    seq_lens: Tensor,
    num_heads: int = 0,
    softmax_scale: float = 0.0,
    block_table_RN: Tensor | None = None,
) -> Batch:
    """The C description of a step's requests; numbers are as `int32_rows` makes them, the others attention's."""
    requests = seq_lens.shape[0]
    assert query_starts.shape[0] == requests + 1
    assert query_starts.dtype == seq_lens.dtype == torch.int32
    table, stride = None, 0
    if block_table_RN is not None:
        assert block_table_RN.dtype == torch.int32
        assert block_table_RN.shape[0] >= requests
        assert block_table_RN.stride(-1) == 1
        table, stride = block_table_RN.data_ptr(), table_stride(block_table_RN, requests)
    pointers = (query_starts.data_ptr(), seq_lens.data_ptr(), table)
    keep = (query_starts, seq_lens, block_table_RN)
    return Batch.plain(keep, *pointers, stride, requests, num_heads, softmax_scale)


def table_stride(table_RN: Tensor, requests: int) -> int:
    """Between requests; with one request, as far as it may read."""
    return table_RN.stride(0) if requests > 1 else table_RN.shape[1]


def int32_rows(numbers: Numbers, device: torch.device | str = "cpu") -> Tensor:
    """Numbers as kernels read them: int32, those of a row side by side."""
    if not isinstance(numbers, Tensor):
        return torch.tensor(numbers, dtype=torch.int32, device=device)
    found = numbers.to(device=device, dtype=torch.int32)
    return found if found.stride(-1) == 1 else found.contiguous()


def host_list(numbers: Numbers) -> Sequence[int]:
    """Numbers as the torch code loops over them."""
    return numbers.tolist() if isinstance(numbers, Tensor) else numbers
