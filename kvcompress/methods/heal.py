"""Heal: short distillation from the original model, after stages that changed its weights or its attention.

    minimise over the chosen weights   kl_weight * KL(original || changed) + (1 - kl_weight) * next-token cross-entropy

What is trained keeps its names, shapes and dtypes, so the result is served exactly as before. With `lora_rank`, each
chosen matrix W gets a low-rank difference, W + up @ down (Hu et al., LoRA, arXiv 2106.09685, without its scale),
which is added up at the end. Distillation after low-rank conversion: TransMLA (arXiv 2502.07864) and most of the
literature on factored weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.safetensors_file import TensorInfo, TensorSpec, read_header, read_tensor, save_tensors
from kvcompress.methods.base import Outline, TrainedConfig, TransformMethod
from kvcompress.methods.context import Context
from kvcompress.recipe import Kind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kvcompress.calibration.corpus import Calibration
    from kvcompress.training.distill import Progress
    from kvcompress.training.state import StateFile


_FLOATING = ("F64", "F32", "F16", "BF16")
"""Dtypes of tensors that can be trained."""


class HealConfig(TrainedConfig):
    kind: ClassVar[Kind] = "heal"
    whole_models: ClassVar[int] = 5  # original, healed, gradients, and AdamW's two moments
    method: Literal["heal"] = "heal"
    train: Literal["changed", "all"] | list[str] = Field(
        "changed", description="tensors that differ from the original's, all of them, or regular expressions of names"
    )
    lora_rank: int | None = Field(
        None, ge=1, description="train low-rank differences of matrices, at ten times the learning rate or so"
    )
    steps: int = Field(200, ge=1, description="training steps")
    learning_rate: float = Field(3e-4, gt=0.0, description="at its highest; it rises first and then falls to zero")
    kl_weight: float = Field(0.75, ge=0.0, le=1.0, description="share of the KL divergence in the loss")

    @field_validator("train")
    @classmethod
    def _patterns(cls, train: str | list[str]) -> str | list[str]:
        for pattern in train if isinstance(train, list) else []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
        return train


class Heal(TransformMethod[HealConfig]):
    name = "heal"
    summary = "Distillation from the original model, to win back what earlier stages lost"
    paper = "Hinton et al. 2015, arXiv 1503.02531; LoRA, arXiv 2106.09685"
    config = HealConfig

    def outline(self, config: HealConfig, before: Outline) -> Outline:
        if not isinstance(config.train, str):
            _matching(config.train, (name for name, (dtype, _) in before.tensors.items() if dtype in _FLOATING))
        return before

    def transform(self, config: HealConfig, before: Outline, context: Context) -> tuple[Healed, Outline]:
        from kvcompress.training import distributed
        from kvcompress.training.state import StateFile

        names = _trained_names(config, context.original, context.checkpoint)
        path = context.scratch("healed.safetensors")
        data = context.sample(config.samples, config.length)
        state = StateFile(context.work, f"{context.unit}:training", data.sha256)
        job = _Job(context.original, context.checkpoint, config, names, data, context.seed, context.device)
        tensors = distributed.everywhere(_train, job, state=state, progress=context.progress)
        save_tensors(path, tensors)
        return Healed(path), before


class Healed:
    """The transform: trained tensors, from a file, in place of those they started from."""

    def __init__(self, path: Path) -> None:
        self._path, self._infos = path, read_header(path).tensors

    def plan(self, info: TensorInfo) -> Sequence[TensorSpec] | None:
        return [TensorSpec(info.name, info.dtype, info.shape)] if info.name in self._infos else None

    def apply(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        yield name, read_tensor(self._path, self._infos[name])


@dataclass(frozen=True)
class _Job:
    """What every process needs to train."""

    original: Checkpoint
    checkpoint: Checkpoint
    config: HealConfig
    names: list[str]
    data: Calibration
    seed: int
    device: str


def _trained_names(config: HealConfig, original: Checkpoint, checkpoint: Checkpoint) -> list[str]:
    """Names of floating-point tensors to train, in order.

    Raises:
        ValueError: there are none.
    """
    floating = [name for name, info in checkpoint.tensors.items() if info.dtype in _FLOATING]
    if config.train == "all":
        return floating
    if config.train != "changed":
        return _matching(config.train, floating)
    return _some(
        [name for name in floating if _changed(name, original, checkpoint)], "every tensor is as in the original model"
    )


def _matching(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    found = [name for name in names if any(re.search(pattern, name) for pattern in patterns)]
    return _some(found, f"no tensor matches {' or '.join(patterns)}")


def _some(names: list[str], why_not: str) -> list[str]:
    if not names:
        raise ValueError(f"heal has nothing to train: {why_not}; name tensors in `train`, or leave the stage out")
    return names


def _changed(name: str, original: Checkpoint, checkpoint: Checkpoint) -> bool:
    if name not in original.tensors or original.tensors[name].shape != checkpoint.tensors[name].shape:
        return True
    return not bool((original.read(name) == checkpoint.read(name)).all())


def _train(job: _Job, state: StateFile | None = None, progress: Progress | None = None) -> dict[str, Tensor]:
    """The trained tensors, in the dtypes they are stored in. Trains in float32, whatever the run computes in."""
    import torch

    from kvcompress.training import distill, distributed, models

    config, device = job.config, distributed.local_device(job.device)
    teacher = models.load_model(job.original, device, torch.float32)
    student = models.load_model(job.checkpoint, device, torch.float32)
    if config.recompute:
        models.save_activations(student)
    known = dict(student.named_parameters())
    missing = [name for name in job.names if name not in known]
    if missing:
        raise ValueError(f"heal cannot train {missing[0]}: the loaded model has no parameter of that name")
    if config.lora_rank is None:
        trained = {name: known[name].requires_grad_(True) for name in job.names}
    else:
        trained = _add_lora(student, job.names, config.lora_rank, job.seed)
    schedule = distill.Schedule(config.steps, config.batch, config.learning_rate, config.kl_weight, job.seed)
    distill.distill(
        models.logits(teacher), models.logits(student), trained, job.data, schedule, state=state, progress=progress
    )
    result = {}
    for name in job.names:
        owner, _, last = name.rpartition(".")
        whole: Tensor = getattr(student.get_submodule(owner), last)
        dtype = job.checkpoint.read(name).dtype
        result[name] = whole.detach().to(dtype).cpu().contiguous()
    return result


def _add_lora(model: Any, names: Sequence[str], rank: int, seed: int) -> dict[str, nn.Parameter]:
    """Give the matrices among the tensors a trainable low-rank difference, zero at first; vectors train as they are."""
    import torch
    from torch.nn.utils import parametrize

    from kvcompress.training.lora import LowRankDifference

    generator = torch.Generator().manual_seed(seed)
    trained: dict[str, nn.Parameter] = {}
    for name in names:
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        parameter = getattr(module, last)
        if parameter.ndim != 2:
            trained[name] = parameter.requires_grad_(True)
            continue
        difference = LowRankDifference(tuple(parameter.shape), min(rank, *parameter.shape), generator).to(
            parameter.device
        )
        parametrize.register_parametrization(module, last, difference)
        trained |= {f"{name}:down": difference.down, f"{name}:up": difference.up}
    return trained
