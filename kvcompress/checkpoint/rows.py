"""Some rows of a large matrix, without the rest of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.safetensors_file import TORCH_DTYPES

if TYPE_CHECKING:
    from torch import Tensor


def read_rows(checkpoint: Checkpoint, name: str, rows_N: Tensor) -> Tensor:
    """Rows of the matrix `name`, `[len(rows), columns]` in its stored dtype. An embedding may be the largest tensor
    of a model while a calibration set uses a few thousand of its rows.

    Args:
        rows_N: ascending row numbers, int64.

    Raises:
        ValueError: the checkpoint has no such matrix, or no such row.
    """
    import torch

    info = checkpoint.tensors.get(name)
    if info is None or len(info.shape) != 2:
        raise ValueError(f"{checkpoint.path} has no matrix {name}; is it a complete decoder checkpoint?")
    if len(rows_N) and int(rows_N[-1]) >= info.shape[0]:
        raise ValueError(f"row {int(rows_N[-1])} of {name} was asked for; it has {info.shape[0]} rows")
    row_bytes = info.nbytes // info.shape[0]
    buffer = bytearray(len(rows_N) * row_bytes)
    view = memoryview(buffer)
    with open(checkpoint.file(info.file), "rb") as stream:
        for index, row in enumerate(rows_N.tolist()):
            stream.seek(info.offset + row * row_bytes)
            stream.readinto(view[index * row_bytes : (index + 1) * row_bytes])
    return torch.frombuffer(buffer, dtype=getattr(torch, TORCH_DTYPES[info.dtype])).view(len(rows_N), info.shape[1])
