"""Shared fixtures: a tiny model with a tokenizer, and recipes as files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import require, tiny
from tests.compression import BALANCED

pytest_plugins = ["tests.e2e.support_matrix.collect"]


def pytest_configure() -> None:
    require.required()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Models this small run and train faster on one thread, by far so on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer of 300 tokens."""
    directory = tiny.save_model(tmp_path_factory.mktemp("base") / "tiny-llama", vocab_size=300)
    tiny.save_tokenizer(directory)
    return directory


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(BALANCED)
    return path
