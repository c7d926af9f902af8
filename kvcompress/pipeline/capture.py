"""First pass: run the calibration text through the model, layer by layer, and keep what the basis is fitted to."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from kvcompress.calibration.states import StatesCollector
from kvcompress.calibration.statistics import LayerAccumulator
from kvcompress.codec.rope import Rope
from kvcompress.methods import walk
from kvcompress.methods.context import CAPTURED, Context

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kvcompress.calibration.capture import Collector, LayerRunner
    from kvcompress.methods.base import Needs


def capture(context: Context, needs: Needs = "statistics") -> None:
    """Leave what a basis needs of every compressed layer where `Context.statistics` and `states` find it."""
    if needs != "nothing":
        walk.forward(context, CAPTURED, partial(_capture_layer, context, needs), "capturing layers")


def _capture_layer(
    context: Context, needs: Needs, runner: LayerRunner, layer: nn.Module, index: int, hidden_NTC: Tensor
) -> walk.Kept:
    if index not in context.compressed_layers:
        return walk.advance(context, runner, layer, index, hidden_NTC)
    accumulator, states = LayerAccumulator(), None
    if needs != "statistics":
        rope = Rope.of(runner.config) if needs == "states" else None
        states = StatesCollector(context.calibration.tokens_NT.size, rope)

    def collector(sample: int, offset: int) -> Collector:
        return _collector(accumulator, states, hidden_NTC[sample], offset)

    runner.advance(layer, hidden_NTC, context.calibration, collector)
    statistics = accumulator.finish(runner.output_projection(layer).weight).tensors()
    if not all(bool(tensor.isfinite().all()) for tensor in statistics.values()):
        raise ValueError(
            f"layer {index}: keys, values or attention outputs are so large that their squares overflow; its "
            f"{runner.names.attention} weights are damaged or badly scaled; get another copy of the model"
        )
    parts = {"statistics": statistics}
    if states is not None:
        parts["states"] = states.finish().tensors()
    return walk.Kept(parts=parts)


def _collector(
    accumulator: LayerAccumulator, states: StatesCollector | None, hidden_TC: Tensor, offset: int
) -> Collector:
    def collect(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> None:
        accumulator.add(query, key, value, softmax_scale, hidden_TC[None])
        if states is not None:
            states.add(key, value, offset)

    return collect
