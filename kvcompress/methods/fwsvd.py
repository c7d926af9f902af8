"""FWSVD: linear layers as low-rank factors, the truncation weighted by what the loss or the activations say matters.

A weight W `[out, in]` becomes up @ down of rank r, the minimum of the weighted error

    || L (W - up down) R ||_F

in closed form: with U the r leading left singular vectors of L W R, up = L^-1 U and down = U^T L W. The weightings:

    none               L = I, R = I: plain SVD
    fisher             L = I, R = diag(i), i_n = sqrt(sum over outputs of the mean squared gradient by W[:, n])
    activation         L = I, R R^T = C = E[x x^T], the inputs' second moment (Cholesky): the error of the outputs
    fisher+activation  R as for activation, L^T L = B = E[d d^T] with d the gradient by the layer's output (Cholesky):
                       the loss to second order, its Fisher matrix taken as the Kronecker product of B and C, both full

Sources: FWSVD (Hsu et al., ICLR 2022, arXiv 2207.00112), importance from gradients on the calibration task; SVD-LLM
(Wang et al., ICLR 2025, arXiv 2403.07378), whitening by the full input covariance, here of what a layer gets once the
layers before it are compressed; GFWSVD (arXiv 2505.17974), the Kronecker-factored Fisher matrix, here with the factors
of K-FAC (Martens & Grosse, 2015, arXiv 1503.05671). Ranks are uniform, by Fisher mass as in Palu (arXiv 2407.21118), or
go where they remove most weighted error; all three take the same number of parameters.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from kvcompress.families import LINEARS
from kvcompress.methods import walk
from kvcompress.methods.base import Outline, TransformMethod
from kvcompress.methods.context import Context
from kvcompress.methods.factoring import Factors, Linear, factored, find
from kvcompress.methods.ranks import Ranks, allocate, by_importance, uniform
from kvcompress.recipe import Kind, StageConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kvcompress.calibration.capture import LayerRunner
    from kvcompress.calibration.linears import InputMoments

_RIDGE = 1e-4
"""Share of its mean diagonal added to a moment: directions without data are kept as plain SVD would."""


class FwsvdConfig(StageConfig):
    kind: ClassVar[Kind] = "weights"
    method: Literal["fwsvd"] = "fwsvd"
    weighting: Literal["none", "fisher", "activation", "fisher+activation"] = Field(
        "fisher+activation", description="error to minimise: of the weights, or as loss, activations or both see it"
    )
    ranks: Literal["uniform", "fisher", "error"] = Field(
        "error", description="how the budget is shared: evenly, by Fisher mass, or where it removes most error"
    )
    removed: float = Field(0.2, ge=0.0, le=0.9, description="share of the target layers' parameters to remove")
    targets: tuple[str, ...] = Field(LINEARS, description="linear layers to factor")

    @field_validator("targets")
    @classmethod
    def _known(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        for name in targets:
            if name not in LINEARS:
                near = difflib.get_close_matches(name, LINEARS, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"unknown linear layer {name!r}{hint}; expected any of {', '.join(LINEARS)}")
        if not targets or len(set(targets)) < len(targets):
            raise ValueError("expected at least one linear layer, and none twice")
        return targets


class Fwsvd(TransformMethod[FwsvdConfig]):
    name = "fwsvd"
    summary = "Linear layers as low-rank factors, weighted by Fisher information and activations"
    paper = "FWSVD, arXiv 2207.00112; SVD-LLM, arXiv 2403.07378; GFWSVD, arXiv 2505.17974"
    config = FwsvdConfig

    def outline(self, config: FwsvdConfig, before: Outline) -> Outline:
        linears = find(config.targets, before)
        return factored(before, linears, uniform([linear.shape for linear in linears], config.removed))

    def transform(self, config: FwsvdConfig, before: Outline, context: Context) -> tuple[Factors, Outline]:
        linears = find(config.targets, before)
        run = _Run(config, context, linears)
        chosen = run.ranks()
        ranks = {linear: rank for linear, rank in zip(linears, chosen, strict=True) if rank is not None}
        run.factor(ranks)
        return Factors(ranks, run.factors_of), factored(before, linears, chosen)


class _Run:
    """One stage at work. Each step is resumable; none holds more than one decoder layer."""

    def __init__(self, config: FwsvdConfig, context: Context, linears: Sequence[Linear]) -> None:
        self.config, self.context, self.linears = config, context, linears
        self.uses_inputs = "activation" in config.weighting
        if "fisher" in config.weighting or config.ranks == "fisher":
            walk.backward(context, "gradients", self._gradients)

    def ranks(self) -> Ranks:
        """The rank of every matrix; None where it stays as it is."""
        unit = f"{self.context.unit}:ranks"
        if not self.context.work.done(unit):
            self.context.work.commit(unit, {}, self._choose())
        chosen: Ranks = self.context.work.data(unit)
        return chosen

    def factor(self, ranks: Mapping[Linear, int]) -> None:
        """Leave every matrix's factors in scratch."""

        def visit(linear: Linear, weight_OI: Tensor, inputs: InputMoments | None) -> dict[str, Tensor]:
            if linear not in ranks:
                return {}
            down_RI, up_OR = factor(weight_OI, ranks[linear], *self._sides(linear, inputs))
            return {"down": down_RI.to(weight_OI.dtype), "up": up_OR.to(weight_OI.dtype)}

        self._each("factors", visit)

    def factors_of(self, linear: Linear) -> tuple[Tensor, Tensor]:
        """Down and up of one matrix, in the checkpoint's dtype."""
        down_RI, up_OR = (self._result("factors", linear, side) for side in ("down", "up"))
        return down_RI, up_OR

    def _choose(self) -> Ranks:
        shapes = [linear.shape for linear in self.linears]
        nominal = uniform(shapes, self.config.removed)
        if self.config.ranks == "uniform" or not any(nominal):
            return nominal
        if self.config.ranks == "fisher":
            mass = [
                float(self._result("gradients", linear, "fisher").sum()) / linear.shape.size for linear in self.linears
            ]
            return allocate(shapes, by_importance(shapes, [value**0.5 for value in mass]), nominal)
        self._each("errors", lambda *given: {"errors": self._errors(*given)})
        errors = [self._result("errors", linear, "errors").numpy() for linear in self.linears]
        return allocate(shapes, errors, nominal)

    def _errors(self, linear: Linear, weight_OI: Tensor, inputs: InputMoments | None) -> Tensor:
        """Squared weighted error at every rank that saves parameters, comparable between matrices, float64."""
        import torch

        left, right = self._sides(linear, inputs)
        energy = torch.linalg.svdvals(_weighted(weight_OI.double(), left, right)).square().cpu()
        errors: Tensor = energy.flip(0).cumsum(0).flip(0)[1 : linear.shape.max_rank + 1]
        if self.config.weighting == "fisher+activation":
            return errors
        # Row importance adds up over outputs what one weight's Fisher information is the mean of; and errors of
        # weights or outputs say nothing of the loss, so there each matrix's own size is the measure.
        errors /= (
            linear.shape.out_features
            if self.config.weighting == "fisher"
            else energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
        )
        return errors

    def _sides(self, linear: Linear, inputs: InputMoments | None) -> tuple[Tensor | None, Tensor | None]:
        """L `[out, out]`, upper triangular, and R `[in, in]` or its diagonal `[in]`; None for the identity."""
        left = right = None
        if inputs is not None:
            right = _cholesky(inputs.moment_II(linear.local))
        elif self.config.weighting == "fisher":
            fisher_I = self._result("gradients", linear, "fisher").to(self.context.device)
            right = (fisher_I + _RIDGE * fisher_I.mean()).sqrt()
        if self.config.weighting == "fisher+activation":
            left = _cholesky(self._result("gradients", linear, "output").to(self.context.device)).mT
        return left, right

    def _result(self, done: str, linear: Linear, name: str) -> Tensor:
        return walk.result(self.context, done, linear.layer, f"{linear.local}.{name}")

    def _gradients(
        self, runner: LayerRunner, layer: nn.Module, index: int, hidden_NTC: Tensor, gradient_NTC: Tensor
    ) -> walk.Kept:
        from kvcompress.calibration.linears import GradientMoments

        moments = GradientMoments(outputs=self.config.weighting == "fisher+activation")
        linears = [linear for linear in self.linears if linear.layer == index]
        with moments.watch({linear.local: layer.get_submodule(linear.local) for linear in linears}):
            for sample, offset in enumerate(self.context.calibration.offsets_N.tolist()):
                gradient_NTC[sample] = runner.backward(layer, hidden_NTC[sample], offset, gradient_NTC[sample])
        return walk.Kept(moments.tensors())

    def _each(self, name: str, visit: Callable[[Linear, Tensor, InputMoments | None], dict[str, Tensor]]) -> None:
        """Visit every matrix; where the weighting needs inputs, with what its layer sees after the visits before.

        A visit that returns factors changes the layer: the layers after it get the outputs of the compressed one.
        """
        if self.uses_inputs:
            walk.forward(self.context, name, lambda *given: self._with_inputs(visit, *given))
            return

        def plain(index: int) -> dict[str, Tensor]:
            checkpoint, device = self.context.checkpoint, self.context.device
            return {
                f"{linear.local}.{key}": tensor
                for linear in self.linears
                if linear.layer == index
                for key, tensor in visit(linear, checkpoint.read(f"{linear.name}.weight").to(device), None).items()
            }

        walk.each(self.context, name, plain)

    def _with_inputs(
        self,
        visit: Callable[[Linear, Tensor, InputMoments | None], dict[str, Tensor]],
        runner: LayerRunner,
        layer: nn.Module,
        index: int,
        hidden_NTC: Tensor,
    ) -> walk.Kept:
        from torch import nn

        from kvcompress.calibration.linears import InputMoments
        from kvcompress.modeling.low_rank import product

        modules = {linear: layer.get_submodule(linear.local) for linear in self.linears if linear.layer == index}
        inputs = InputMoments()
        found: dict[str, Tensor] = {}
        with inputs.watch({linear.local: module for linear, module in modules.items()}):
            for sample, offset in enumerate(self.context.calibration.offsets_N.tolist()):
                runner.forward(layer, hidden_NTC[sample], offset, None)
        for linear, module in modules.items():
            tensors = visit(linear, module.get_parameter("weight"), inputs)
            found |= {f"{linear.local}.{key}": tensor for key, tensor in tensors.items()}
            if "up" in tensors:
                module.weight = nn.Parameter(product(tensors["down"], tensors["up"]), requires_grad=False)
        runner.advance(layer, hidden_NTC, self.context.calibration)
        return walk.Kept(found)


def factor(weight_OI: Tensor, rank: int, left_OO: Tensor | None, right: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factors of the module's docstring: down `[rank, in]` and up `[out, rank]`, float64.

    Args:
        left_OO: L, upper triangular; None for the identity.
        right: R `[in, in]`, or its diagonal `[in]`; None for the identity.
    """
    import torch

    weight = weight_OI.double()
    if left_OO is not None:  # its size takes no part; where the loss hardly moves, it is near the end of float64
        left_OO = left_OO / left_OO.diagonal().mean()
    axes_OR = torch.linalg.svd(_weighted(weight, left_OO, right), full_matrices=False).U[:, :rank]
    # The sign of a singular vector is arbitrary; fixing it makes the same data give the same bytes.
    axes_OR = axes_OR * torch.where(axes_OR.gather(0, axes_OR.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    down_RI = axes_OR.mT @ _weighted(weight, left_OO, None)
    up_OR = axes_OR if left_OO is None else torch.linalg.solve_triangular(left_OO, axes_OR, upper=True)
    # Rows of down and columns of up of one length: both keep their precision in the checkpoint's dtype.
    balance_R = (up_OR.norm(dim=0) / down_RI.norm(dim=1).clamp_min(1e-30)).sqrt()
    return down_RI * balance_R[:, None], up_OR / balance_R


def _weighted(weight_OI: Tensor, left_OO: Tensor | None, right: Tensor | None) -> Tensor:
    """L W R."""
    weighted = weight_OI if left_OO is None else left_OO @ weight_OI
    if right is None:
        return weighted
    return weighted * right if right.ndim == 1 else weighted @ right


def _cholesky(moment_DD: Tensor) -> Tensor:
    """Lower triangular root of a second moment, ridged."""
    import torch

    ridged, mean = moment_DD.clone(), moment_DD.diagonal().mean()
    # Of nothing but zeros the identity: all errors are alike.
    ridged.diagonal().add_(_RIDGE * mean if bool(mean > 0) else 1.0)
    root: Tensor = torch.linalg.cholesky(ridged)
    return root
