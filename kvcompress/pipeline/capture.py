"""First pass: run the calibration text through the model, layer by layer, and keep what the basis is fitted to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcompress.calibration.states import StatesCollector
from kvcompress.calibration.statistics import LayerAccumulator
from kvcompress.checkpoint.hashing import sha256_file
from kvcompress.checkpoint.safetensors_file import load_tensors, save_tensors
from kvcompress.codec.rope import Rope
from kvcompress.methods.context import Context, states_file, statistics_file

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.calibration.capture import Collector, LayerRunner
    from kvcompress.methods.base import Needs


def capture(context: Context, needs: Needs = "statistics") -> None:
    """Leave what a basis needs of every compressed layer in scratch, where `Context.statistics` and `states` find it.

    Each layer is a unit of the journal. The hidden states after a layer are kept only until the next layer is done, so
    a resumed run goes back to where they still are.
    """
    if needs == "nothing":
        return
    total = context.geometry.num_layers
    first = next((index for index in range(total) if not _done(context, index, needs)), total)
    while 0 < first < total and not _intact(context, first - 1, _hidden_file(first - 1)):
        first -= 1
    if first == total:
        return
    runner = context.runner()
    rope = Rope.of(runner.config) if needs == "states" else None
    if first:
        hidden_NTC = load_tensors(context.work.scratch(_hidden_file(first - 1)))["hidden"].to(context.device)
    else:
        hidden_NTC = runner.embed(context.calibration)
    for index in range(first, total):
        context.progress("capturing layers", index, total)
        collector = None
        if needs != "statistics":
            collector = StatesCollector(context.calibration.tokens_NT.size, rope)
        files = _capture_layer(runner, context, index, hidden_NTC, collector)
        if index + 1 < total:
            files[_hidden_file(index)] = {"hidden": hidden_NTC}
        saved = {name: save_tensors(context.work.scratch(name), content).sha256 for name, content in files.items()}
        context.work.commit(_unit(index), {}, {"scratch": saved})
        if index:
            context.work.scratch(_hidden_file(index - 1)).unlink(missing_ok=True)
    context.progress("capturing layers", total, total)


def _capture_layer(
    runner: LayerRunner, context: Context, index: int, hidden_NTC: Tensor, states: StatesCollector | None
) -> dict[str, dict[str, Tensor]]:
    """Advance `hidden_NTC` in place to the layer's output. Returns the files to keep."""
    compressed = index in context.compressed_layers
    accumulator = LayerAccumulator()
    with runner.layer(index) as layer:
        for sample, offset in enumerate(context.calibration.offsets_N.tolist()):
            collect = _collector(accumulator, states, hidden_NTC[sample], offset) if compressed else None
            hidden_NTC[sample] = runner.forward(layer, hidden_NTC[sample], offset, collect)
        if not compressed:
            return {}
        statistics = accumulator.finish(runner.output_projection(layer).weight).tensors()
        if not all(bool(tensor.isfinite().all()) for tensor in statistics.values()):
            raise ValueError(
                f"layer {index}: keys, values or attention outputs are so large that their squares overflow; its "
                "self_attn weights are damaged or badly scaled; get another copy of the model"
            )
        files = {statistics_file(index): statistics}
        if states is not None:
            files[states_file(index)] = states.finish().tensors()
        return files


def _collector(
    accumulator: LayerAccumulator, states: StatesCollector | None, hidden_TC: Tensor, offset: int
) -> Collector:
    def collect(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> None:
        accumulator.add(query, key, value, softmax_scale, hidden_TC[None])
        if states is not None:
            states.add(key, value, offset)

    return collect


def _unit(index: int) -> str:
    return f"capture:{index}"


def _hidden_file(index: int) -> str:
    return f"layer-{index:04d}-hidden.safetensors"


def _done(context: Context, index: int, needs: Needs) -> bool:
    if not context.work.done(_unit(index)):
        return False
    files = [statistics_file(index)] if needs == "statistics" else [statistics_file(index), states_file(index)]
    return index not in context.compressed_layers or all(_intact(context, index, name) for name in files)


def _intact(context: Context, index: int, name: str) -> bool:
    path = context.work.scratch(name)
    recorded = context.work.data(_unit(index))["scratch"]
    return name in recorded and path.is_file() and sha256_file(path) == recorded[name]
