"""Fitting what a group of layers shares: their states side by side in a metric, and the best latent for them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvcompress.methods.base import LatentBasis, LayerBases
from kvcompress.methods.shared import Membership, SharedBases, SharedBasis

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.calibration.statistics import LayerStatistics
    from kvcompress.codec.rope import Rope
    from kvcompress.methods.context import Context

Fitted = tuple[Sequence[LatentBasis], Sequence[SharedBasis]]
"""Bases of keys and of values, by layer of the group."""

_RIDGE = 1e-3
"""Share of a metric's mean eigenvalue added to it, so that directions nothing looks at keep a finite inverse."""

_NOTHING = 1e-20
"""Energy of a head's states in the metric, in parts of the group's: what float64 makes of zero."""


@dataclass(frozen=True)
class States:
    """One side ("k" or "v") of the layers' calibration states, centred where asked, in a metric.

    Nothing else knows what a state is: keys before RoPE, values, or whatever else a model may cache.
    """

    context: Context
    side: str
    metric: str
    center: bool
    skip: int
    """First tokens of every sample left out."""
    means_HD: dict[int, Tensor] = field(default_factory=dict)
    roots: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, index: int) -> Tensor:
        """One layer's states `[tokens, channels]`, float64; notes its mean and the metric's roots."""
        captured = self.context.states(index).after(self.skip)
        x_THD = captured.values_THD if self.side == "v" else captured.keys_THD
        assert x_THD is not None, "keys were not captured"
        x = x_THD.double()
        self.means_HD[index] = x.mean(0) if self.center else x.new_zeros(x.shape[1:])
        if index not in self.roots:
            self.roots[index] = _metric_roots(self.context.statistics(index), self.side, self.metric)
        weighted: Tensor = (x - self.means_HD[index]).flatten(1) @ self.roots[index][0]
        return weighted


def fit_side(states: States, group: Sequence[int], rank: int) -> list[SharedBasis]:
    """Every layer's part in the truncated SVD of a group's states, at `rank` channels per layer."""
    from kvcompress.calibration.joint import joint_axes

    axes_WXR, variance_R = joint_axes(group, states, len(group) * rank)
    bases = _shared_bases(
        [states.means_HD[index] for index in group], [states.roots[index] for index in group], axes_WXR, variance_R
    )
    states.roots.clear()
    return bases


def once(
    context: Context,
    group: tuple[int, ...],
    members: Sequence[Membership],
    rope: Rope | None,
    fit: Callable[[], Fitted],
) -> dict[int, LayerBases]:
    """A group's bases, fitted by `fit` unless an earlier run has left them."""
    from kvcompress.checkpoint.hashing import sha256_file
    from kvcompress.checkpoint.safetensors_file import load_tensors, save_tensors

    unit = f"{context.unit}-group:{group[0]}"
    path = context.scratch(f"group-{group[0]:04d}.safetensors")
    kept = context.work.done(unit) and path.is_file()
    if not kept or sha256_file(path) != context.work.data(unit)["sha256"]:
        sides = zip(group, *fit(), strict=True)
        tensors = {
            f"{index}.{side}.{name}": tensor
            for index, k, v in sides
            for side, basis in (("k", k), ("v", v))
            for name, tensor in vars(basis).items()
        }
        context.work.commit(unit, {}, {"sha256": save_tensors(path, tensors).sha256})
    tensors = load_tensors(path)

    def read(kind: type[LatentBasis], index: int, side: str) -> LatentBasis:
        return kind(**{name: tensors[f"{index}.{side}.{name}"] for name in LatentBasis.__dataclass_fields__})

    return {
        index: SharedBases(
            read(SharedBasis if member.share == "kv" else LatentBasis, index, "k"),
            read(SharedBasis, index, "v"),
            member=member,
            rope=rope,
        )
        for index, member in zip(group, members, strict=True)
    }


def _metric_roots(statistics: LayerStatistics, side: str, metric: str) -> tuple[Tensor, Tensor]:
    """S and its inverse for one layer's states, channels x channels, float64; the identity for metric "none".

    Values: S S = the layer's output moment, head by head. Keys before RoPE meet queries from every distance, which
    turns each pair of channels through all angles: what is left of the query moment is a weight per pair.
    """
    import torch

    values = side == "v"
    moment_HDD = (statistics.output_moment_HDD if values else statistics.query_moment_HDD).double()
    if metric == "none":
        identity = torch.eye(moment_HDD.shape[0] * moment_HDD.shape[1], dtype=torch.float64)
        return identity, identity
    if not values:
        weight_HD = torch.diagonal(moment_HDD, dim1=-2, dim2=-1).unflatten(-1, (2, -1)).mean(-2).repeat(1, 2)
        moment_HDD = torch.diag_embed(weight_HD)
    spectrum_HD, axes_HDD = torch.linalg.eigh(moment_HDD)
    # One ridge for all heads: a head that nothing looks at must not count like the others.
    mean = spectrum_HD.mean()
    # Where nothing looks at the whole layer, all errors are alike: no metric.
    ridge = _RIDGE * mean if bool(mean > 0) else mean.new_ones(())
    root_HD = (spectrum_HD.clamp_min(0.0) + ridge).sqrt()[..., None, :]
    return torch.block_diag(*((axes_HDD * root_HD) @ axes_HDD.mT)), torch.block_diag(
        *((axes_HDD / root_HD) @ axes_HDD.mT)
    )


def _shared_bases(
    means_HD: Sequence[Tensor], roots: Sequence[tuple[Tensor, Tensor]], axes_WXR: Tensor, variance_R: Tensor
) -> list[SharedBasis]:
    """Each layer's part in a group's latent, whose channels are dealt to the layers in turn.

    Args:
        means_HD: of each layer's states.
        roots: S and its inverse of each layer's metric.
        axes_WXR: principal axes of the layers' states times S, side by side, strongest first.
        variance_R: along them.
    """
    import torch

    layers = len(means_HD)
    # Channel c goes to stripe c mod W: all stripes are worth the same, and each is ordered.
    dealt_R = torch.arange(len(variance_R)).unflatten(0, (-1, layers)).T.flatten()
    variance_WR = variance_R[dealt_R].unflatten(0, (layers, -1)).float().contiguous()
    bases = []
    for mean_HD, (root, inverse), axes_XR in zip(means_HD, roots, axes_WXR[..., dealt_R], strict=True):
        basis_HDR = (root @ axes_XR).unflatten(0, mean_HD.shape)
        inverse_HRD = (axes_XR.mT @ inverse).unflatten(1, mean_HD.shape).transpose(0, 1)
        # What takes no part in the latent is its mean exactly: rounding leaves a trace of the other layers' axes.
        energy_H = (axes_XR.square() @ variance_R[dealt_R]).unflatten(0, mean_HD.shape).sum(-1)
        inverse_HRD = inverse_HRD * (energy_H > _NOTHING * variance_R.sum())[:, None, None]
        bases.append(
            SharedBasis(mean_HD.float(), basis_HDR.float().contiguous(), inverse_HRD.float().contiguous(), variance_WR)
        )
    return bases
