"""Records whose tokens are whole, `uint8 [blocks, records, tokens per block, bytes]`, for the C interface."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.ops.interface.common import Side
from kvcompress.ops.interface.shared import Records
from kvcompress.ops.rows import table_stride


def records_struct(records_NHSX: Tensor, side: Side, table_RN: Tensor | None = None) -> Records:
    """One layer's records; blocks may be strided."""
    blocks, records, block_size, token_bytes = records_NHSX.shape
    assert records_NHSX.dtype == torch.uint8
    strides = records_NHSX.stride()
    assert strides[1:] == (block_size * token_bytes, token_bytes, 1) or records == 1
    table, stride = None, 0
    if table_RN is not None:
        assert table_RN.dtype == torch.int32
        table, stride = table_RN.data_ptr(), table_stride(table_RN, table_RN.shape[0])
    keep, place = (records_NHSX, table_RN), (records_NHSX.data_ptr(), blocks, strides[0])
    return Records.plain(keep, *place, block_size, records, token_bytes, side, table, stride)


def records_array(records: Sequence[Tensor], tables: Sequence[Tensor], side: Side) -> ctypes.Array[Records]:
    structs = [records_struct(found, side, table) for found, table in zip(records, tables, strict=True)]
    return (Records * len(structs))(*structs)
