"""Bases of latents that several layers have in common, as a basis method and an encoding pass them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvcompress.codec.bands import SideSpec
from kvcompress.codec.groups import Share
from kvcompress.codec.shared.spec import SharedSpec
from kvcompress.codec.spec import CacheSpec
from kvcompress.geometry import SERVED_BYTES, ModelGeometry
from kvcompress.methods.base import LatentBasis, LayerBases, Profile

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.calibration.statistics import LayerStatistics
    from kvcompress.codec.rope import Rope
    from kvcompress.codec.shared.codec import SharedCodec, SharedSide


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
        from kvcompress.codec.shared.codec import SharedSide

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
        from kvcompress.codec.shared.codec import SharedCodec

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
            SERVED_BYTES,
        )
