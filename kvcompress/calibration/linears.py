"""What the linear layers of a decoder layer see: moments of their inputs, and gradients of the language-model loss.

Products of one sample are taken in float32 and added up in float64, on the device of the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.calibration.capture import LayerRunner, cast_rows, stored_linear
from kvcompress.checkpoint.rows import read_rows


class InputMoments:
    """E[x x^T] of every linear layer's input. Layers that are given the same tensor share one matrix."""

    def __init__(self) -> None:
        self.tokens = 0
        self._source: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._last: tuple[str, Tensor] | None = None

    @contextmanager
    def watch(self, linears: Mapping[str, nn.Module]) -> Iterator[None]:
        """Count what runs through these layers, by name, inside the block."""
        handles = [
            linear.register_forward_pre_hook(lambda _, args, name=name: self._add(name, args[0]))
            for name, linear in linears.items()
        ]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def moment_II(self, name: str) -> Tensor:
        """float64 `[in, in]`, not centred."""
        return self._sums[self._source[name]] / self.tokens

    def _add(self, name: str, x: Tensor) -> None:
        if self._last is not None and self._last[1] is x:
            self._source[name] = self._last[0]
            return
        self._last = (name, x)
        rows_TI = x.flatten(0, -2).float()
        if not self._sums or name == next(iter(self._sums)):
            self.tokens += rows_TI.shape[0]
        self._source[name] = name
        square_II = (rows_TI.mT @ rows_TI).double()
        self._sums[name] = self._sums[name] + square_II if name in self._sums else square_II


class GradientMoments:
    """Second moments of the loss gradients of every linear layer, one sample (sequence) after another.

    With G `[out, in]` the gradient of one sample's loss by the weight, and d `[out]` that by one token's output: fisher
    `[in]` is the mean over samples of G^2 summed over outputs, and output `[out, out]` the mean over tokens of d d^T.
    """

    def __init__(self, outputs: bool) -> None:
        """`outputs`: whether to collect d d^T as well."""
        self.outputs = outputs
        self.samples = 0
        self.tokens = 0
        self._fisher: dict[str, Tensor] = {}
        self._output: dict[str, Tensor] = {}

    @contextmanager
    def watch(self, linears: Mapping[str, nn.Module]) -> Iterator[None]:
        """Count the backward passes inside the block, one sample each."""
        handles = [
            linear.register_forward_hook(lambda _, args, output, name=name: self._hook(name, args[0], output))
            for name, linear in linears.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def tensors(self) -> dict[str, Tensor]:
        """`NAME.fisher` of every layer, and `NAME.output` where it was collected; float64."""
        found = {f"{name}.fisher": total / self.samples for name, total in self._fisher.items()}
        return found | {f"{name}.output": total / self.tokens for name, total in self._output.items()}

    def _hook(self, name: str, x: Tensor, output: Tensor) -> None:
        inputs_TI = x.detach().flatten(0, -2).float()
        output.register_hook(lambda gradient: self._add(name, inputs_TI, gradient.flatten(0, -2).float()))

    def _add(self, name: str, inputs_TI: Tensor, gradient_TO: Tensor) -> None:
        if name == next(iter(self._fisher), name):  # counted once for all layers
            self.samples += 1
            self.tokens += gradient_TO.shape[0]
        fisher_I = (gradient_TO.mT @ inputs_TI).double().square().sum(0)
        self._fisher[name] = self._fisher[name] + fisher_I if name in self._fisher else fisher_I
        if self.outputs:
            square_OO = (gradient_TO.mT @ gradient_TO).double()
            self._output[name] = self._output[name] + square_OO if name in self._output else square_OO


class LossHead:
    """The final norm and the output embedding: from the last layer's hidden states to the loss and its gradient."""

    def __init__(self, runner: LayerRunner) -> None:
        checkpoint, names = runner.checkpoint, runner.names
        self.norm: Any = runner.model.get_submodule(names.norm)
        self.norm.load_state_dict(
            {"weight": checkpoint.read(f"{names.norm}.weight").to(runner.device, runner.dtype)}, assign=True
        )
        self.norm.requires_grad_(False)
        head, embedding = f"{names.head}.weight", f"{names.embedding}.weight"
        name = head if head in checkpoint.tensors else embedding
        divisor = runner.family.logits_divisor
        self.divisor = 1.0 if divisor is None else runner.number(divisor)
        rows = torch.arange(checkpoint.tensors[name].shape[0])
        self.weight_VC = read_rows(checkpoint, name, rows).to(runner.device)

    def gradient(self, hidden_TC: Tensor, tokens_T: Tensor) -> tuple[float, Tensor]:
        """Sum of a sample's next-token cross-entropies, and its gradient by the last layer's output `[length, hidden]`.

        The gradient by the logits is softmax minus one-hot; so no graph over the vocabulary is kept.
        """
        with torch.enable_grad():
            inputs = hidden_TC.detach().requires_grad_()
            normed_TC = self.norm(inputs)
        with torch.no_grad():
            head = nn.Linear(1, 1, bias=False, device="meta")
            head.weight = nn.Parameter(self.weight_VC, requires_grad=False)
            log_probs_TV = stored_linear(head, normed_TC[:-1]).div_(self.divisor).log_softmax(-1)
            targets_T1 = tokens_T[1:, None].to(log_probs_TV.device)
            loss = -float(log_probs_TV.gather(1, targets_T1).sum())
            by_logits_TV = log_probs_TV.exp_()
            by_logits_TV.scatter_add_(1, targets_T1, torch.full_like(targets_T1, -1, dtype=by_logits_TV.dtype))
            by_logits_TV /= self.divisor
            by_normed_TC = torch.zeros_like(normed_TC)
            for rows in cast_rows(self.weight_VC, by_logits_TV.dtype):
                by_normed_TC[:-1] += by_logits_TV[:, rows] @ self.weight_VC[rows].to(by_logits_TV.dtype)
        normed_TC.backward(by_normed_TC)
        assert inputs.grad is not None
        return loss, inputs.grad
