"""Reading some rows of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.rows import read_rows

MATRICES = {
    "embedding": torch.arange(60, dtype=torch.float32).reshape(12, 5).to(torch.bfloat16),
    "other": torch.ones(3),
}


@pytest.mark.parametrize("rows", [[0], [11], [0, 3, 4, 11], [2, 2], []])
def test_rows_equal_those_of_the_whole_matrix(make_checkpoint: Callable[..., Path], rows: list[int]) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tensors=MATRICES))
    rows_N = torch.tensor(rows, dtype=torch.int64)
    found = read_rows(checkpoint, "embedding", rows_N)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, MATRICES["embedding"][rows_N])


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing", "has no matrix missing"), ("other", "has no matrix other"), ("embedding", "row 12 of embedding")],
)
def test_what_is_not_there_is_refused(make_checkpoint: Callable[..., Path], name: str, message: str) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tensors=MATRICES))
    with pytest.raises(ValueError, match=message):
        read_rows(checkpoint, name, torch.tensor([1, 12]))


def test_a_matrix_cut_after_opening_is_refused(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(tensors=MATRICES)
    checkpoint = Checkpoint.open(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="ended while"):
        read_rows(checkpoint, "embedding", torch.tensor([11]))
