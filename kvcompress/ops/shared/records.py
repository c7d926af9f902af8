"""Records whose tokens are whole, `uint8 [blocks, records, tokens per block, bytes]`, for the C"""

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
    assert records_NHSX.stride()[1:] == (block_size * token_bytes, token_bytes, 1) or records == 1
    return Records(
        data=records_NHSX,
        num_blocks=blocks,
        block_stride=records_NHSX.stride(0),
        block_size=block_size,
        records=records,
        token_bytes=token_bytes,
        side=side,
        block_table=table_RN,
        block_table_stride=0 if table_RN is None else table_stride(table_RN),
    )


def records_array(records: Sequence[Tensor], tables: Sequence[Tensor], side: Side) -> ctypes.Array[Records]:
    structs = [records_struct(found, side, table) for found, table in zip(records, tables, strict=True)]
    return (Records * len(structs))(*structs)
