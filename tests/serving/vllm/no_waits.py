"""A stretch of code that neither reads from a GPU nor sends to one by a copy that waits, checked without a GPU.

Tensors of the host are named, and what is computed from them is the host's; all others stand for the device's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"}
_SENDS = {"tensor", "as_tensor", "from_numpy"}
_READING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique",
    "unique_",
    "bincount",
    "equal",
    "repeat_interleave",
)


class _Functions(TorchFunctionMode):
    """Methods by which Python code gets at numbers: on the CPU most of them never reach an operation."""

    def __init__(self, host: Sequence[Tensor]) -> None:
        super().__init__()
        self._host = list(host)  # kept, so that no other tensor takes their memory

    def _is_hosts(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in {known.untyped_storage().data_ptr() for known in self._host}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _READS and not self._is_hosts(args[0]):
            raise AssertionError(f"{name} reads from the device")
        to_host = name == "to" and "cpu" in (*args[1:], *kwargs.values())
        if to_host and not kwargs.get("non_blocking"):
            raise AssertionError("to('cpu') waits for the device")
        if name in _SENDS:
            raise AssertionError(f"{name} sends to the device, and waits")
        result = func(*args, **kwargs)
        tensors = [each for each in args if isinstance(each, Tensor)]
        if to_host or (isinstance(result, Tensor) and tensors and all(map(self._is_hosts, tensors))):
            self._host.append(result)
        return result


class _Operations(TorchDispatchMode):
    """Operations whose result, or its size, is read from the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            index is not None and index.dtype == torch.bool
            for index in next((each for each in args if isinstance(each, list)), [])
            if isinstance(index, Tensor)
        )
        if by_mask or name.startswith(_READING):
            raise AssertionError(f"{name} reads from the device")
        return func(*args, **(kwargs or {}))


class NoWaits:
    """A context in which waiting for the device is an AssertionError.

    Args:
        host: tensors that are the host's.
    """

    def __init__(self, *host: Tensor) -> None:
        self._modes = (_Functions(host), _Operations())

    def __enter__(self) -> None:
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
