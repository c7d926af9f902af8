"""The way through the decoder layers with the calibration samples: journalled, resumable, one layer in memory.

What a walk keeps of its layers stays in the stage's scratch until the run is over. The hidden states between layers are
kept while they are needed: those before the next layer on the way forward, all of them for a way back. A resumed walk
goes back to where they still are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvcompress.checkpoint.hashing import sha256_file
from kvcompress.checkpoint.safetensors_file import load_tensors, read_header, read_tensor, save_tensors
from kvcompress.methods.context import Context, layer_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kvcompress.calibration.capture import LayerRunner


@dataclass(frozen=True)
class Kept:
    """What a visit leaves of a layer."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    record: Any = None
    """JSON for the journal."""
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """More tensors, in files of their own (`context.layer_file`)."""


Visit = Callable[["LayerRunner", "nn.Module", int, "Tensor"], Kept]
"""Given the runner, a layer, its index and the hidden states `[samples, length, hidden]` before it: advances those in
place to what the next layer is to see."""

VisitBack = Callable[["LayerRunner", "nn.Module", int, "Tensor", "Tensor"], Kept]
"""As `Visit`, with the gradients by the layer's output in addition: takes those in place to the layer's input."""


def forward(context: Context, name: str, visit: Visit, what: str = "", *, keep_inputs: bool = False) -> list[Any]:
    """Visit every layer from the first to the last; `result` has the tensors that were kept.

    Args:
        name: of the walk, unique within the stage; its units and files carry it.
        what: is being done, for the progress line; the walk's name without.
        keep_inputs: keep the hidden states before every layer but the first, and after the last.

    Returns:
        What was recorded of each layer.
    """
    what, total = what or f"{context.unit} {name}", context.geometry.num_layers
    done = 0
    while done < total and _done(context, name, done):
        done += 1
    needed = range(1, total + 1) if keep_inputs else range(1, total)
    while done > 0 and (keep_inputs or done < total):
        behind = [at for at in needed if at <= done] if keep_inputs else [done]
        if all(_intact(context, name, at - 1, hidden_file(name, at)) for at in behind):
            break
        done -= 1
    if done < total:
        runner = context.runner()
        hidden_NTC = _hidden(context, runner, name, done)
        for index in range(done, total):
            context.progress(what, index, total)
            with runner.layer(index) as layer:
                kept = visit(runner, layer, index, hidden_NTC)
            _commit(context, name, index, kept, index + 1 if keep_inputs or index + 1 < total else None, hidden_NTC)
            if not keep_inputs:
                context.scratch(hidden_file(name, index)).unlink(missing_ok=True)
        context.progress(what, total, total)
    return [context.work.data(_unit(context, name, index))["record"] for index in range(total)]


def each(context: Context, name: str, visit: Callable[[int], dict[str, Tensor]]) -> None:
    """Visit every layer's index; the layers themselves are not run."""
    total = context.geometry.num_layers
    for index in range(total):
        context.progress(f"{context.unit} {name}", index, total)
        if not _done(context, name, index):
            _commit(context, name, index, Kept(visit(index)))
    context.progress(f"{context.unit} {name}", total, total)


def backward(context: Context, name: str, visit: VisitBack) -> None:
    """Visit every layer from the last to the first with the gradient of the language-model loss on each sample.

    Needs scratch space for the hidden states of all layers at once.
    """
    import torch

    from kvcompress.calibration.linears import LossHead

    total = context.geometry.num_layers
    left = total
    while left > 0 and _done(context, name, left - 1):
        left -= 1
    if left == 0:
        return
    while left < total and not _intact(context, name, left, hidden_file(name, left)):
        left += 1
    inputs = f"{name}-inputs"
    forward(context, inputs, lambda *given: advance(context, *given), keep_inputs=True)
    runner = context.runner()
    if left < total:
        gradient_NTC = _hidden(context, runner, name, left)
    else:
        head = LossHead(runner)
        hidden_NTC = _hidden(context, runner, inputs, total)
        tokens_NT = torch.from_numpy(context.calibration.tokens_NT)
        gradient_NTC = torch.stack([head.gradient(*sample)[1] for sample in zip(hidden_NTC, tokens_NT, strict=True)])
        del head
    for index in reversed(range(left)):
        context.progress(f"{context.unit} {name}", total - 1 - index, total)
        hidden_NTC = _hidden(context, runner, inputs, index)
        with runner.layer(index) as layer:
            kept = visit(runner, layer, index, hidden_NTC, gradient_NTC)
        _commit(context, name, index, kept, index or None, gradient_NTC)
        context.scratch(hidden_file(name, index + 1)).unlink(missing_ok=True)
    for index in range(1, total + 1):
        context.scratch(hidden_file(inputs, index)).unlink(missing_ok=True)
    context.progress(f"{context.unit} {name}", total, total)


def advance(context: Context, runner: LayerRunner, layer: nn.Module, index: int, hidden_NTC: Tensor) -> Kept:
    """Every sample through one layer, in place: a visit that keeps nothing."""
    runner.advance(layer, hidden_NTC, context.calibration)
    return Kept()


def result(context: Context, name: str, index: int, tensor: str) -> Tensor:
    """One tensor that a finished walk kept of one layer, on the CPU."""
    path = context.scratch(layer_file(name, index))
    return read_tensor(path, read_header(path).tensors[tensor])


def hidden_file(name: str, index: int) -> str:
    """Scratch name of the hidden states (on the way back: their gradients) before layer `index`."""
    return f"{name}-hidden-{index:04d}.safetensors"


def _hidden(context: Context, runner: LayerRunner, name: str, index: int) -> Tensor:
    if index == 0:
        return runner.embed(context.calibration)
    return load_tensors(context.scratch(hidden_file(name, index)))["hidden"].to(context.device)


def _commit(
    context: Context, name: str, index: int, kept: Kept, before: int | None = None, hidden_NTC: Tensor | None = None
) -> None:
    """Save what was kept of a layer, and hidden states before the layer `before`, and note that the layer is done."""
    parts = {"": kept.tensors, **kept.parts} if kept.tensors or not kept.parts else kept.parts
    files = {layer_file(name, index, part): tensors for part, tensors in parts.items()}
    if before is not None and hidden_NTC is not None:
        files[hidden_file(name, before)] = {"hidden": hidden_NTC}
    saved = {file: save_tensors(context.scratch(file), tensors).sha256 for file, tensors in files.items()}
    context.work.commit(_unit(context, name, index), {}, {"record": kept.record, "scratch": saved})


def _done(context: Context, name: str, index: int) -> bool:
    """Whether a layer has been visited and all that was kept of it is still as it was."""
    unit = _unit(context, name, index)
    if not context.work.done(unit):
        return False
    files = [file for file in context.work.data(unit)["scratch"] if not file.startswith(f"{name}-hidden-")]
    return all(_intact(context, name, index, file) for file in files)


def _intact(context: Context, name: str, index: int, file: str) -> bool:
    """Whether a layer has been visited and a file then written is still as it was."""
    unit = _unit(context, name, index)
    if not context.work.done(unit):
        return False
    recorded = context.work.data(unit)["scratch"]
    return file in recorded and context.scratch(file).is_file() and sha256_file(context.scratch(file)) == recorded[file]


def _unit(context: Context, name: str, index: int) -> str:
    return f"{context.unit}:{name}:{index}"
