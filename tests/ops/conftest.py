from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from kvcompress.ops import library
from tests.ops import emulated


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: threads would spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=library.LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction-set level of this machine, forced."""
    name: str = request.param
    if library.load() is None:
        pytest.skip(f"no compiled kernels; build them with cmake and set {library.PATH_VARIABLE}")
    monkeypatch.delenv(library.LEVEL_VARIABLE, raising=False)
    if library.LEVELS.index(name) > library.level():
        pytest.skip(f"this machine has no {name}")
    monkeypatch.setenv(library.LEVEL_VARIABLE, name)
    return name


@pytest.fixture
def compiled() -> None:
    if library.load() is None:
        pytest.skip(f"no compiled kernels; build them with cmake and set {library.PATH_VARIABLE}")


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: None)


@pytest.fixture(params=emulated.COPIES)
def kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The CUDA kernels by emulation, with each way of copying."""
    found = emulated.library(request.param)
    if found is None:
        pytest.skip("no C++ compiler to emulate the CUDA kernels with")
    return found
