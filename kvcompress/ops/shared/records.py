"""Records whose tokens are whole, `uint8 [blocks, records, tokens per block, bytes]`, for the C interface."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.ops import interface


def records_struct(records_NHSX: Tensor, side: interface.Side, table_RN: Tensor | None = None) -> interface.Records:
    """One layer's records; blocks may be strided."""
    blocks, records, block_size, token_bytes = records_NHSX.shape
    assert records_NHSX.dtype == torch.uint8
    assert records_NHSX.stride()[1:] == (block_size * token_bytes, token_bytes, 1) or records == 1
    return interface.Records(
        data=records_NHSX.data_ptr(),
        num_blocks=blocks,
        block_stride=records_NHSX.stride(0),
        block_size=block_size,
        records=records,
        token_bytes=token_bytes,
        side=side,
        block_table=None if table_RN is None else table_RN.data_ptr(),
        block_table_stride=0 if table_RN is None else _row_stride(table_RN),
    )


def records_array(
    records: Sequence[Tensor], tables: Sequence[Tensor], side: interface.Side
) -> ctypes.Array[interface.Records]:
    structs = [records_struct(found, side, table) for found, table in zip(records, tables, strict=True)]
    return (interface.Records * len(structs))(*structs)


def _row_stride(table_RN: Tensor) -> int:
    return table_RN.stride(0) if table_RN.shape[0] > 1 else table_RN.shape[1]
