"""Runs the canary's prompt beside the measuring pass and writes down what the codec states of it (`codec.canary`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from kvcompress.calibration.capture import LayerRunner
from kvcompress.calibration.corpus import Calibration
from kvcompress.codec import canary
from kvcompress.codec.contract import CacheCodec


class Witness:
    """Sees every layer once, in order; a group of layers is stated when its last one has been seen."""

    def __init__(self, runner: LayerRunner, tokens: list[int], num_layers: int) -> None:
        # Positions from 0, as a server would give them.
        sample = Calibration("canary", np.array([tokens], dtype=np.int64), np.zeros(1, dtype=np.int64))
        self._runner, self._hidden_TC = runner, runner.embed(sample)[0]
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.statement = canary.ModelStatement(tokens, [None] * num_layers)

    def see(self, layer: nn.Module, index: int) -> None:
        """Run the prompt through a layer and keep its keys and values."""

        def collect(query: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, softmax_scale: float) -> None:
            self._seen[index] = key_BHTD[0].transpose(0, 1), value_BHTD[0].transpose(0, 1)

        self._hidden_TC = self._runner.forward(layer, self._hidden_TC, 0, collect)

    def state(self, group: Sequence[int], codecs: Sequence[CacheCodec]) -> None:
        """State layers that are decoded together."""
        keys, values = zip(*(self._seen.pop(index) for index in group), strict=True)
        for index, stated in zip(group, canary.state(codecs, keys, values), strict=True):
            self.statement.layers[index] = stated
