"""Walks over the decoder layers with the calibration samples: journalled, resumable, one layer in memory.

A walk's results stay in the stage's scratch, one file per layer, until the run is over. The hidden states between
layers are kept while they are needed: those before the next layer on the way forward, all of them for a way back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvcompress.checkpoint.hashing import sha256_file
from kvcompress.checkpoint.safetensors_file import load_tensors, read_header, read_tensor, save_tensors
from kvcompress.methods.context import Context

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kvcompress.calibration.capture import LayerRunner

Visit = Callable[["LayerRunner", "nn.Module", int, "Tensor"], dict[str, "Tensor"]]
"""Given the runner, a layer, its index and the hidden states `[samples, length, hidden]` before it: advances those in
place to the layer's output, and returns the tensors to keep."""

VisitBack = Callable[["LayerRunner", "nn.Module", int, "Tensor", "Tensor"], dict[str, "Tensor"]]
"""As `Visit`, with the gradients by the layer's output in addition: takes those in place to the layer's input."""


def forward(context: Context, name: str, visit: Visit, *, keep_inputs: bool = False) -> None:
    """Visit every layer from the first to the last; `result` has what was kept.

    Args:
        name: of the walk, unique within the stage.
        keep_inputs: keep the hidden states before every layer and after the last one.
    """
    total = context.geometry.num_layers
    done = 0
    while done < total and _intact(context, name, done, result_file(name, done)):
        done += 1
    needed = range(1, total + 1) if keep_inputs else range(1, total)
    while done > 0 and (keep_inputs or done < total):
        behind = [at for at in needed if at <= done] if keep_inputs else [done]
        if all(_intact(context, name, at - 1, hidden_file(name, at)) for at in behind):
            break
        done -= 1
    if done == total:
        return
    runner = context.runner()
    if done:
        hidden_NTC = load_tensors(context.scratch(hidden_file(name, done)))["hidden"].to(context.device)
    else:
        hidden_NTC = runner.embed(context.calibration)
        if keep_inputs:
            save_tensors(context.scratch(hidden_file(name, 0)), {"hidden": hidden_NTC})
    for index in range(done, total):
        context.progress(f"{context.unit} {name}", index, total)
        with runner.layer(index) as layer:
            files = {result_file(name, index): visit(runner, layer, index, hidden_NTC)}
        if keep_inputs or index + 1 < total:
            files[hidden_file(name, index + 1)] = {"hidden": hidden_NTC}
        _commit(context, name, index, files)
        if not keep_inputs:
            context.scratch(hidden_file(name, index)).unlink(missing_ok=True)
    context.progress(f"{context.unit} {name}", total, total)


def each(context: Context, name: str, visit: Callable[[int], dict[str, Tensor]]) -> None:
    """Visit every layer's index; the layers themselves are not run."""
    total = context.geometry.num_layers
    for index in range(total):
        context.progress(f"{context.unit} {name}", index, total)
        if not _intact(context, name, index, result_file(name, index)):
            _commit(context, name, index, {result_file(name, index): visit(index)})
    context.progress(f"{context.unit} {name}", total, total)


def advance(
    context: Context, runner: LayerRunner, layer: nn.Module, index: int, hidden_NTC: Tensor
) -> dict[str, Tensor]:
    """Every sample through one layer, in place: a visit that keeps nothing."""
    for sample, offset in enumerate(context.calibration.offsets_N.tolist()):
        hidden_NTC[sample] = runner.forward(layer, hidden_NTC[sample], offset, None)
    return {}


def backward(context: Context, name: str, visit: VisitBack) -> None:
    """Visit every layer from the last to the first with the gradient of the language-model loss on each sample.

    Needs scratch space for the hidden states of all layers at once.
    """
    import torch

    from kvcompress.calibration.linears import LossHead

    total = context.geometry.num_layers
    left = total
    while left > 0 and _intact(context, name, left - 1, result_file(name, left - 1)):
        left -= 1
    if left == 0:
        return
    while left < total and not _intact(context, name, left, hidden_file(name, left)):
        left += 1
    inputs = f"{name}-inputs"
    forward(context, inputs, lambda *given: advance(context, *given), keep_inputs=True)
    runner = context.runner()
    if left < total:
        gradient_NTC = load_tensors(context.scratch(hidden_file(name, left)))["hidden"].to(context.device)
    else:
        head = LossHead(runner)
        hidden_NTC = load_tensors(context.scratch(hidden_file(inputs, total)))["hidden"].to(context.device)
        tokens_NT = torch.from_numpy(context.calibration.tokens_NT)
        gradient_NTC = torch.stack([head.gradient(*sample)[1] for sample in zip(hidden_NTC, tokens_NT, strict=True)])
        del head
    for index in reversed(range(left)):
        context.progress(f"{context.unit} {name}", total - 1 - index, total)
        hidden_NTC = load_tensors(context.scratch(hidden_file(inputs, index)))["hidden"].to(context.device)
        with runner.layer(index) as layer:
            files = {result_file(name, index): visit(runner, layer, index, hidden_NTC, gradient_NTC)}
        if index:
            files[hidden_file(name, index)] = {"hidden": gradient_NTC}
        _commit(context, name, index, files)
        context.scratch(hidden_file(name, index + 1)).unlink(missing_ok=True)
    for index in range(total + 1):
        context.scratch(hidden_file(inputs, index)).unlink(missing_ok=True)
    context.progress(f"{context.unit} {name}", total, total)


def result(context: Context, name: str, index: int, tensor: str) -> Tensor:
    """One tensor that a finished walk kept of one layer, on the CPU."""
    path = context.scratch(result_file(name, index))
    return read_tensor(path, read_header(path).tensors[tensor])


def result_file(name: str, index: int) -> str:
    """Scratch name of one layer's results."""
    return f"{name}-{index:04d}.safetensors"


def hidden_file(name: str, index: int) -> str:
    """Scratch name of the hidden states (on the way back: their gradients) before layer `index`."""
    return f"{name}-hidden-{index:04d}.safetensors"


def _commit(context: Context, name: str, index: int, files: dict[str, dict[str, Tensor]]) -> None:
    saved = {file: save_tensors(context.scratch(file), tensors).sha256 for file, tensors in files.items()}
    context.work.commit(_unit(context, name, index), {}, {"scratch": saved})


def _intact(context: Context, name: str, index: int, file: str) -> bool:
    """Whether the walk has passed a layer and a file it then wrote is still as it was."""
    unit = _unit(context, name, index)
    if not context.work.done(unit):
        return False
    recorded = context.work.data(unit)["scratch"]
    return file in recorded and context.scratch(file).is_file() and sha256_file(context.scratch(file)) == recorded[file]


def _unit(context: Context, name: str, index: int) -> str:
    return f"{context.unit}:{name}:{index}"
