"""Data parallel training under `torchrun`, with plain torch.distributed calls.

Rank 0, the leader, runs the whole pipeline; the others wait in `follow` and join in where the leader calls
`everywhere`. So only one process writes files, and a recipe without training leaves the others idle. All ranks must
see the same files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""The followers wait through everything the leader does alone."""


def world_size() -> int:
    """Processes that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextmanager
def leading() -> Iterator[None]:
    """Around the leader's work: connects to the followers, and lets them go at the end. Does nothing without any."""
    if world_size() == 1:
        yield
        return
    _connect()
    yield
    # Not after an error: followers then stop with one of their own as soon as the leader is gone.
    _broadcast(None)
    _disconnect()


def follow() -> None:
    """The whole life of a process that is not the leader."""
    _connect()
    while (call := _broadcast(None)) is not None:
        function, arguments = call
        function(*arguments)
    _disconnect()


def everywhere(function: Callable[..., T], *arguments: Any, **leader_only: Any) -> T:
    """Call a function of module level on every rank at once; the leader's result.

    Args:
        arguments: sent to the followers, so they must pickle.
        leader_only: keyword arguments that followers leave at their defaults.
    """
    if world_size() > 1:
        _broadcast((function, arguments))
    return function(*arguments, **leader_only)


def local_device(device: str) -> str:
    """The device of this rank where `device` only says which kind."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and world_size() > 1 else device


def from_leader(tensors: Iterable[Any]) -> None:
    """Overwrite tensors with the leader's, in place."""
    if world_size() > 1:
        from torch import distributed

        for tensor in tensors:
            distributed.broadcast(tensor, 0)


def average(tensors: Iterable[Any]) -> None:
    """Overwrite tensors with their mean over all ranks, in place."""
    if world_size() > 1:
        from torch import distributed

        for tensor in tensors:
            distributed.all_reduce(tensor)
            tensor /= world_size()


def _connect() -> None:
    import torch
    from torch import distributed

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=_PATIENCE)


def _disconnect() -> None:
    from torch import distributed

    distributed.destroy_process_group()


def _broadcast(message: Any) -> Any:
    """What the leader sends, on every rank. Pickle never leaves the processes of this run."""
    import torch
    from torch import distributed

    box = [message]
    distributed.broadcast_object_list(box, 0, device=torch.device("cpu"))
    return box[0]
