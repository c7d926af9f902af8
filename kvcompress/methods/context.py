"""What a method may use while it works: the model, calibration data, statistics, and a place for unfinished work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress.calibration.corpus import Calibration
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.workdir import WorkDir
from kvcompress.geometry import ModelGeometry

if TYPE_CHECKING:
    from kvcompress.calibration.capture import LayerRunner
    from kvcompress.calibration.states import LayerStates
    from kvcompress.calibration.statistics import LayerStatistics

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Context:
    """One stage's view of the run. All state a method keeps goes through `work` under names that begin with `unit`."""

    checkpoint: Checkpoint
    """The model as the stages before have left it."""
    original: Checkpoint
    """The model as it was given: what training distils from."""
    geometry: ModelGeometry
    calibration: Calibration
    sample: Callable[[int, int], Calibration]
    """More of the calibration text: so many samples of so many tokens, for training."""
    compressed_layers: Sequence[int]
    """Decoder layers that get a codec."""
    seed: int
    device: str
    dtype: str
    """Name of the torch dtype to compute in."""
    work: WorkDir
    unit: str
    """Prefix of this stage's units in the journal and of its scratch files, such as `stage-1`."""
    progress: Progress

    def runner(self) -> LayerRunner:
        """The model's decoder layers, to run one by one."""
        import torch

        from kvcompress.calibration.capture import LayerRunner

        return LayerRunner(self.checkpoint, self.device, getattr(torch, self.dtype))

    def model_config(self) -> Any:
        """The model's transformers config."""
        from kvcompress.modeling.config import load_config

        return load_config(self.checkpoint.path)

    def scratch(self, name: str) -> Path:
        """A file of this stage that is kept until the run is over."""
        return self.work.scratch(f"{self.unit}-{name}")

    def statistics(self, index: int) -> LayerStatistics:
        """Moments of one compressed layer; the pipeline has captured them before a basis is fitted."""
        from kvcompress.calibration.statistics import LayerStatistics
        from kvcompress.checkpoint.safetensors_file import load_tensors

        return LayerStatistics.from_tensors(load_tensors(self.scratch(layer_file(CAPTURED, index, "statistics"))))

    def states(self, index: int) -> LayerStates:
        """States of one compressed layer on the calibration tokens, for a basis that has said it needs them."""
        from kvcompress.calibration.states import LayerStates
        from kvcompress.checkpoint.safetensors_file import load_tensors

        return LayerStates.from_tensors(load_tensors(self.scratch(layer_file(CAPTURED, index, "states"))))


CAPTURED = "capture"
"""The walk that leaves statistics and states (`pipeline.capture`)."""


def layer_file(walk: str, index: int, part: str = "") -> str:
    """Scratch name of what a walk kept of one layer."""
    return f"{walk}-{index:04d}{part and f'-{part}'}.safetensors"
