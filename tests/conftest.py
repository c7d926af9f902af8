"""Shared fixtures: a tiny model with a tokenizer, a recipe as a file, the command line, caches that forget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import require, tiny
from tests.command import Run, call
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


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def called(*arguments: object) -> tuple[int, str, str]:
        code = call(*arguments)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return called


@pytest.fixture
def forget() -> Iterator[Callable[[Any], None]]:
    """Has a function with a cache forget what it found, now and after the test."""
    forgetful = []

    def clear(function: Any) -> None:
        function.cache_clear()
        forgetful.append(function)

    yield clear
    for function in forgetful:
        function.cache_clear()
