"""A small model that is whole, and what it is given to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cases.making import copy
from tests.command import Run


@pytest.fixture
def model(base_model: Path, tmp_path: Path) -> Path:
    """A copy of a whole model, to be damaged."""
    return copy(base_model, tmp_path / "model")


@pytest.fixture
def compress(run: Run, model: Path, recipe_file: Path, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """`kvcompress compress` of that model, on as little text as it takes."""

    def call(*options: Any, out: Path = tmp_path / "out") -> tuple[int, str, str]:
        small = ("--samples", 2, "--length", 32)
        return run("compress", model, "--recipe", recipe_file, "--out", out, *small, *options)

    return call
