"""Numbers that grow too large for the dtype of the computation: found where they appear, and named.

Weights themselves are finite: `checkpoint.finite` has seen to that before any work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_ELEMENTS = 1 << 22
"""Looked at together; a whole matrix of booleans would be a third of a layer."""


def is_finite(x: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity."""
    if not x.is_floating_point() or x.element_size() == 1:
        return True
    return all(bool(part.isfinite().all()) for part in x.flatten().split(_ELEMENTS))


def refuse_overflow(layer: Any, index: int, dtype: torch.dtype, run: Callable[[], object]) -> None:
    """Name the module of a decoder layer whose output is the first that is not finite.

    Args:
        layer: with finite weights, whose output has been found not to be.
        run: computes that output again.

    Raises:
        ValueError: always.
    """
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if not found and not all(is_finite(one) for one in outputs if isinstance(one, Tensor)):
                found.append(name)

        return hook

    # Modules finish after those inside them, so the innermost comes first.
    handles = [module.register_forward_hook(look(name)) for name, module in layer.named_modules() if name]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    what = f"the output of {found[0]}" if found else "its output"
    name = str(dtype).removeprefix("torch.")
    remedy = (
        "calibrate with --dtype float32 or --dtype bfloat16"
        if dtype == torch.float16
        else "its weights are too large to compute with; get another copy of the model"
    )
    raise ValueError(f"layer {index}: {what} overflows {name} on the calibration text (NaN or infinity); {remedy}")
