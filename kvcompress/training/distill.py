"""The training loop that every trained method shares: distillation of a student towards a frozen teacher.

    loss = kl_weight * KL(teacher || student) + (1 - kl_weight) * cross-entropy of the next token

averaged over tokens, temperature 1; AdamW without weight decay, linear warm-up, cosine decay to zero, gradients
clipped by their norm. The randomness of a step depends on the seed and the step's number alone, so an interrupted run
that goes on from a saved state gives the same bytes as one that was left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kvcompress.calibration.corpus import Calibration
from kvcompress.training import MICRO_TOKENS, distributed
from kvcompress.training.state import StateFile

Forward = Callable[[Tensor, Tensor], Tensor]
"""Token ids `[batch, length]` and their positions to logits `[batch, length, vocabulary]`."""

Progress = Callable[[str, int, int], None]

SAVE_EVERY = 50
"""Steps between saved states."""

_WARM_UP = 0.05
"""Share of the steps over which the learning rate rises."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train. `batch` is in samples, over all ranks together."""

    steps: int
    batch: int
    learning_rate: float
    kl_weight: float
    seed: int
    clip: float = 1.0
    epsilon: float = 1e-8
    """AdamW's: gradients far below it count as none."""

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm_up = max(1, round(_WARM_UP * self.steps))
        if step < warm_up:
            return self.learning_rate * (step + 1) / warm_up
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, self.steps - warm_up)))

    def order(self, epoch: int, samples: int) -> list[int]:
        """The order of the samples in one pass over them."""
        order: list[int] = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(samples).tolist()
        return order

    def indices(self, step: int, samples: int) -> list[int]:
        """The samples of a step."""
        positions = range(step * self.batch, (step + 1) * self.batch)
        return [self.order(position // samples, samples)[position % samples] for position in positions]


def distill(
    teacher: Forward,
    student: Forward,
    parameters: Mapping[str, nn.Parameter],
    data: Calibration,
    schedule: Schedule,
    *,
    before_step: Callable[[int], None] | None = None,
    state: StateFile | None = None,
    progress: Progress | None = None,
) -> None:
    """Train `parameters` in place. Every rank calls this with the same arguments; `state` and `progress` on rank 0.

    Args:
        teacher: called without gradients; its weights must not be among the parameters.
        student: depends on the parameters.
        data: samples at their positions.
        before_step: called with the number of each step, to draw what the student needs from seed and step.
        state: where to go on from, and where to save states on the way.

    Raises:
        ValueError: the batch cannot be divided among the ranks, or the loss is not finite.
    """
    ranks = distributed.world_size()
    if schedule.batch % ranks:
        raise ValueError(f"a batch of {schedule.batch} samples cannot be divided among {ranks} processes")
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=0.0, eps=schedule.epsilon, weight_decay=0.0, foreach=False
    )
    saved = _optimizer_state(optimizer, parameters)
    first = _restore(saved, state)
    device = next(iter(parameters.values())).device
    for step in range(first, schedule.steps):
        if progress:
            progress("training", step, schedule.steps)
        if before_step:
            before_step(step)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        optimizer.zero_grad()
        indices = schedule.indices(step, len(data.offsets_N))[distributed.rank() :: ranks]
        _backward(teacher, student, data, indices, schedule.kl_weight, device)
        gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
        distributed.average(gradients)
        norm = float(nn.utils.clip_grad_norm_(list(parameters.values()), schedule.clip, foreach=False))
        if not math.isfinite(norm) and step == 0:
            raise ValueError(
                "the loss is not finite before anything was trained: the model overflows the dtype it computes in; use "
                "--dtype float32 or --dtype bfloat16, or another copy of the model"
            )
        if not math.isfinite(norm):
            raise ValueError(f"training diverged at step {step}; lower learning_rate {schedule.learning_rate}")
        optimizer.step()
        if state and ((step + 1) % SAVE_EVERY == 0 or step + 1 == schedule.steps):
            state.save(step + 1, saved)
    if progress:
        progress("training", schedule.steps, schedule.steps)


def loss(teacher_BTV: Tensor, student_BTV: Tensor, tokens_BT: Tensor, kl_weight: float) -> Tensor:
    """The loss above, from logits. KL is over all positions, cross-entropy over those that have a next token."""
    student_log, teacher_log = student_BTV.float().log_softmax(-1), teacher_BTV.float().log_softmax(-1)
    divergence = (teacher_log.exp() * (teacher_log - student_log)).sum(-1).mean()
    entropy = -student_log[:, :-1].gather(-1, tokens_BT[:, 1:, None]).mean()
    return kl_weight * divergence + (1 - kl_weight) * entropy


def batch(data: Calibration, indices: list[int], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token ids and positions of some samples, `[batch, length]` each."""
    tokens_BT = torch.from_numpy(data.tokens_NT[indices])
    positions_BT = torch.from_numpy(data.offsets_N[indices])[:, None] + torch.arange(tokens_BT.shape[1])
    return tokens_BT.to(device), positions_BT.to(device)


def _backward(
    teacher: Forward, student: Forward, data: Calibration, indices: list[int], kl_weight: float, device: torch.device
) -> None:
    """Add the gradients of the mean loss of some samples."""
    micro = max(1, MICRO_TOKENS // data.tokens_NT.shape[1])
    for start in range(0, len(indices), micro):
        part = indices[start : start + micro]
        tokens_BT, positions_BT = batch(data, part, device)
        with torch.no_grad():
            target_BTV = teacher(tokens_BT, positions_BT)
        mean = loss(target_BTV, student(tokens_BT, positions_BT), tokens_BT, kl_weight)
        (mean * (len(part) / len(indices))).backward()


def _optimizer_state(optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Everything a step changes, by name: parameters, AdamW's moments, and its own count of steps."""
    tensors = {}
    for name, parameter in parameters.items():
        moments = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        optimizer.state[parameter] = moments
        tensors[f"{name}:value"] = parameter.data
        tensors |= {f"{name}:{moment}": tensor for moment, tensor in moments.items()}
    return tensors


def _restore(tensors: Mapping[str, Tensor], state: StateFile | None) -> int:
    """Put a saved state in place, on every rank; the number of steps it has behind it."""
    done = torch.zeros((), dtype=torch.int64)
    found = state.load() if state else None
    if found:
        done += found[0]
        for name, tensor in tensors.items():
            tensor.copy_(found[1][name])
    distributed.from_leader([done, *tensors.values()])
    return int(done)
