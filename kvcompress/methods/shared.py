"""Bases of latents that several layers have in common, as a basis method and an encoding pass them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvcompress.codec.shared_spec import Share, SharedSpec
from kvcompress.codec.spec import CacheSpec, SideSpec
from kvcompress.geometry import ModelGeometry
from kvcompress.methods.base import LatentBasis, LayerBases, Profile

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.calibration.statistics import LayerStatistics
    from kvcompress.codec.rope import Rope
    from kvcompress.codec.shared import SharedCodec, SharedSide

_RIDGE = 1e-3
"""Share of a metric's mean eigenvalue added to it, so that directions nothing looks at keep a finite inverse."""


@dataclass(frozen=True)
class Membership:
    """A layer's place in its group, and what the group shares."""

    group: tuple[int, ...]
    place: int
    share: Share
    sink: int = 0
    recent: int = 0


@dataclass(frozen=True)
class SharedBasis(LatentBasis):
    """One layer's part in a group's basis: heads add up to the latent, and `variance_HR` has a row per stripe.

    Channels come stripe by stripe, in every stripe by falling variance.
    """

    def cut(self, rank: int) -> SharedBasis:
        """The first `rank` channels of every stripe."""
        stripes, width = self.variance_HR.shape
        return SharedBasis(
            self.mean_HD,
            self.basis_HDR.unflatten(-1, (stripes, width))[..., :rank].flatten(-2).contiguous(),
            self.inverse_HRD.unflatten(1, (stripes, width))[:, :, :rank].flatten(1, 2).contiguous(),
            self.variance_HR[:, :rank].contiguous(),
        )

    def side_codec(self, spec: SideSpec, scale_HR: Tensor) -> SharedSide:
        from kvcompress.codec.shared import SharedSide

        kept = self.cut(spec.rank)
        return SharedSide(spec, kept.mean_HD, kept.basis_HDR, kept.inverse_HRD, scale_HR)


@dataclass(frozen=True)
class SharedBases(LayerBases):
    """Bases of one layer of a group; with share "v" the keys' is the layer's own."""

    member: Membership
    rope: Rope | None

    def profile(self, statistics: LayerStatistics) -> SharedProfile:
        k_variance_R, v_variance_R = self.k.mean_variance(), self.v.mean_variance()
        return SharedProfile(len(k_variance_R), len(v_variance_R), k_variance_R, v_variance_R, member=self.member)

    def codec(self, spec: Any, k: Any, v: Any) -> SharedCodec:
        from kvcompress.codec.shared import SharedCodec

        return SharedCodec(spec, k, v, self.rope)


@dataclass(frozen=True, kw_only=True)
class SharedProfile(Profile):
    """A layer of a group as an encoding sees it: ranks of its stripes; keys per head with share "v"."""

    form: ClassVar[str] = "shared"

    member: Membership

    def width(self, side: str, geometry: ModelGeometry) -> int:
        per_head = side == "k" and self.member.share == "v"
        return geometry.head_dim * (1 if per_head else geometry.num_kv_heads)

    def spec(self, geometry: ModelGeometry, k: SideSpec, v: SideSpec) -> CacheSpec:
        member = self.member
        return SharedSpec(
            geometry.num_kv_heads,
            geometry.head_dim,
            member.group,
            member.place,
            member.share,
            k,
            v,
            member.sink,
            member.recent,
            geometry.element_bytes,
        )


def metric_roots(statistics: LayerStatistics, side: str, metric: str) -> tuple[Tensor, Tensor]:
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
    ridge = (_RIDGE * spectrum_HD.mean()).clamp_min(torch.finfo(torch.float64).tiny)
    root_HD = (spectrum_HD.clamp_min(0.0) + ridge).sqrt()[..., None, :]
    return torch.block_diag(*((axes_HDD * root_HD) @ axes_HDD.mT)), torch.block_diag(
        *((axes_HDD / root_HD) @ axes_HDD.mT)
    )


def shared_bases(
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
        bases.append(
            SharedBasis(mean_HD.float(), basis_HDR.float().contiguous(), inverse_HRD.float().contiguous(), variance_WR)
        )
    return bases
