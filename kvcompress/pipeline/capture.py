"""First pass: run the calibration text through the model, layer by layer, and keep each layer's statistics."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from kvcompress.calibration.statistics import LayerAccumulator
from kvcompress.checkpoint.hashing import sha256_file
from kvcompress.checkpoint.safetensors_file import load_tensors, save_tensors
from kvcompress.methods.context import Context, statistics_file

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.calibration.capture import LayerRunner


def capture(context: Context) -> None:
    """Leave the statistics of every compressed layer in scratch, where `Context.statistics` finds them.

    Each layer is a unit of the journal. The hidden states after a layer are kept only until the next layer is done, so
    a resumed run goes back to where they still are.
    """
    total = context.geometry.num_layers
    first = next((index for index in range(total) if not _done(context, index)), total)
    while 0 < first < total and not _intact(context, first - 1, _hidden_file(first - 1)):
        first -= 1
    if first == total:
        return
    runner = context.runner()
    if first:
        hidden_NTC = load_tensors(context.work.scratch(_hidden_file(first - 1)))["hidden"].to(context.device)
    else:
        hidden_NTC = runner.embed(context.calibration)
    for index in range(first, total):
        context.progress("capturing layers", index, total)
        files = _capture_layer(runner, context, index, hidden_NTC)
        if index + 1 < total:
            files[_hidden_file(index)] = {"hidden": hidden_NTC}
        saved = {name: save_tensors(context.work.scratch(name), content).sha256 for name, content in files.items()}
        context.work.commit(_unit(index), {}, {"scratch": saved})
        if index:
            context.work.scratch(_hidden_file(index - 1)).unlink(missing_ok=True)
    context.progress("capturing layers", total, total)


def _capture_layer(
    runner: LayerRunner, context: Context, index: int, hidden_NTC: Tensor
) -> dict[str, dict[str, Tensor]]:
    """Advance `hidden_NTC` in place to the layer's output. Returns the files to keep."""
    compressed = index in context.compressed_layers
    accumulator = LayerAccumulator()
    with runner.layer(index) as layer:
        for sample, offset in enumerate(context.calibration.offsets_N.tolist()):
            collect = partial(accumulator.add, hidden_BTC=hidden_NTC[sample][None]) if compressed else None
            hidden_NTC[sample] = runner.forward(layer, hidden_NTC[sample], offset, collect)
        if not compressed:
            return {}
        return {statistics_file(index): accumulator.finish(runner.output_projection(layer).weight).tensors()}


def _unit(index: int) -> str:
    return f"capture:{index}"


def _hidden_file(index: int) -> str:
    return f"layer-{index:04d}-hidden.safetensors"


def _done(context: Context, index: int) -> bool:
    if not context.work.done(_unit(index)):
        return False
    return index not in context.compressed_layers or _intact(context, index, statistics_file(index))


def _intact(context: Context, index: int, name: str) -> bool:
    path = context.work.scratch(name)
    recorded = context.work.data(_unit(index))["scratch"]
    return name in recorded and path.is_file() and sha256_file(path) == recorded[name]
