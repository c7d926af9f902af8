"""Walks through a model layer by layer for a method that changes layers as it goes. Every layer is a journal unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from kvcompress.calibration.capture import LayerRunner
from kvcompress.checkpoint.hashing import sha256_file
from kvcompress.checkpoint.safetensors_file import load_tensors, save_tensors
from kvcompress.methods.context import Context

Step = Callable[[LayerRunner, int, Tensor], tuple[Any, dict[str, Tensor]]]
"""Given the runner, a layer's index and the hidden states before it `[samples, length, hidden]`: advances those in
place to what the next layer is to see, and returns JSON to record and tensors to keep."""


def walk(context: Context, name: str, what: str, step: Step) -> list[Any]:
    """Run `step` on every layer in order; what it returned to be recorded, per layer.

    A resumed walk goes on after the last finished layer: the hidden states after it are kept until the next is done.

    Args:
        name: of this walk, within the stage; its units and files carry it.
        what: is being done, for the progress line.
    """
    total = context.geometry.num_layers
    first = next((index for index in range(total) if not _done(context, name, index)), total)
    while 0 < first < total and not _intact(context, name, first - 1, f"{name}-hidden-{first - 1:04d}.safetensors"):
        first -= 1
    if first < total:
        runner = context.runner()
        if first:
            kept = context.scratch(f"{name}-hidden-{first - 1:04d}.safetensors")
            hidden_NTC = load_tensors(kept)["hidden"].to(context.device)
        else:
            hidden_NTC = runner.embed(context.calibration)
        for index in range(first, total):
            context.progress(what, index, total)
            record, tensors = step(runner, index, hidden_NTC)
            files = {tensors_file(name, index): tensors}
            if index + 1 < total:
                files[f"{name}-hidden-{index:04d}.safetensors"] = {"hidden": hidden_NTC}
            saved = {file: save_tensors(context.scratch(file), content).sha256 for file, content in files.items()}
            context.work.commit(_unit(context, name, index), {}, {"record": record, "scratch": saved})
            if index:
                context.scratch(f"{name}-hidden-{index - 1:04d}.safetensors").unlink(missing_ok=True)
    context.progress(what, total, total)
    return [context.work.data(_unit(context, name, index))["record"] for index in range(total)]


def tensors_file(name: str, index: int) -> str:
    """Scratch name of what a walk kept of one layer."""
    return f"{name}-{index:04d}.safetensors"


def _unit(context: Context, name: str, index: int) -> str:
    return f"{context.unit}:{name}:{index}"


def _done(context: Context, name: str, index: int) -> bool:
    return context.work.done(_unit(context, name, index)) and _intact(context, name, index, tensors_file(name, index))


def _intact(context: Context, name: str, index: int, file: str) -> bool:
    path = context.scratch(file)
    recorded = context.work.data(_unit(context, name, index))["scratch"]
    return file in recorded and path.is_file() and sha256_file(path) == recorded[file]
