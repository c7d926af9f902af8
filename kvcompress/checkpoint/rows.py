"""Some rows of a large matrix, without the rest of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.safetensors_file import read_exactly, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


def read_rows(checkpoint: Checkpoint, name: str, rows_N: Tensor) -> Tensor:
    """Rows of the matrix `name`, `[len(rows), columns]` in its stored dtype. An embedding may be the largest tensor
    of a model while a calibration set uses a few thousand of its rows.

    Args:
        rows_N: ascending row numbers, int64.

    Raises:
        ValueError: the checkpoint has no such matrix, or no such row; or a shard was cut since it was opened.
    """
    import torch

    info = checkpoint.tensors.get(name)
    if info is None or len(info.shape) != 2:
        raise ValueError(f"{checkpoint.path} has no matrix {name}; is it a complete decoder checkpoint?")
    if len(rows_N) and int(rows_N[-1]) >= info.shape[0]:
        raise ValueError(f"row {int(rows_N[-1])} of {name} was asked for; it has {info.shape[0]} rows")
    path, dtype = checkpoint.file(info.file), torch_dtype(checkpoint.path, info)
    row_bytes = info.nbytes // info.shape[0]
    data = torch.empty(len(rows_N) * row_bytes, dtype=torch.uint8)
    view = data.numpy().data
    with open(path, "rb", buffering=0) as file:
        for index, row in enumerate(rows_N.tolist()):
            file.seek(info.offset + row * row_bytes)
            read_exactly(file, view[index * row_bytes : (index + 1) * row_bytes], path, info)
    return data.view(dtype).reshape(len(rows_N), info.shape[1])
