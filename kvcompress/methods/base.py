"""What a method is to the pipeline. Method modules import torch inside functions only: `plan` runs without it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import Field

from kvcompress.checkpoint.safetensors_file import DTYPE_BITS
from kvcompress.codec.bands import CHANNEL_GROUP, SideSpec
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.codec.spec import CacheSpec
from kvcompress.geometry import ModelGeometry
from kvcompress.recipe import Kind, StageConfig
from kvcompress.training import MICRO_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.calibration.statistics import LayerStatistics
    from kvcompress.checkpoint.reader import Checkpoint
    from kvcompress.checkpoint.writer import Transform
    from kvcompress.codec.contract import CacheCodec
    from kvcompress.codec.heads.codec import SideCodec
    from kvcompress.codec.shared.codec import SharedSide
    from kvcompress.methods.context import Context

C = TypeVar("C", bound=StageConfig)

_SCALE_FLOOR = 1e-4
"""Smallest static scale, as a share of the head's largest: a channel that never moved still needs a unit."""


class TrainedConfig(StageConfig):
    """A stage that trains, with the loop of `kvcompress.training`. Subclasses add what differs."""

    whole_models: ClassVar[int]
    """Copies of the whole model in float32 that are in memory, gradients and optimizer included."""

    batch: int = Field(4, ge=1, description="samples per step, over all processes")
    samples: int = Field(256, ge=1, description="training samples, cut from the calibration text")
    length: int = Field(256, ge=2, description="tokens per training sample")
    recompute: bool = Field(False, description="gradient checkpointing: less memory, a third more time")

    @property
    def tokens_at_a_time(self) -> int:
        """Tokens whose activations are in memory together."""
        return min(self.batch, max(1, MICRO_TOKENS // self.length)) * self.length


@dataclass(frozen=True)
class LatentBasis:
    """A fitted basis of keys or values of one layer: latent = (x - mean) @ basis, x ~ mean + latent @ inverse.

    Channels are ordered by variance, most first. All tensors float32.
    """

    mean_HD: Tensor
    basis_HDR: Tensor
    inverse_HRD: Tensor
    variance_HR: Tensor
    """Variance of each latent channel on the calibration data."""

    def cut(self, rank: int) -> LatentBasis:
        """The first `rank` channels."""
        return LatentBasis(
            self.mean_HD,
            self.basis_HDR[..., :rank].contiguous(),
            self.inverse_HRD[:, :rank].contiguous(),
            self.variance_HR[:, :rank].contiguous(),
        )

    def mean_variance(self) -> list[float]:
        """Variance of each channel, mean over heads."""
        variance_R: list[float] = self.variance_HR.mean(0).tolist()
        return variance_R

    def scale_HR(self) -> Tensor:
        """The static scale of each latent channel: its deviation, or where it never moved, a small unit."""
        deviation_HR = self.variance_HR.sqrt()
        largest_H1 = deviation_HR.amax(-1, keepdim=True)
        return deviation_HR.maximum(_SCALE_FLOOR * largest_H1).where(largest_H1 > 0, 1.0)

    @property
    def moved_H11(self) -> Tensor:
        """1 for heads whose states have moved. One that never has is its mean exactly: its latents, whose codes are
        never 0, are to add nothing.
        """
        return (self.variance_HR > 0).any(-1)[:, None, None].float()

    def weight(self, moment_HDD: Tensor, sensitivity_H: Tensor) -> float:
        """Squared error in the layer's output, relative to the residual stream, per unit of latent variance lost.

        An error d of a key or a value costs d^T M d, with M the moment of what it is multiplied by; an error of latent
        channel r is row r of `inverse`. In attention's metric that cost is 1 for every channel.
        """
        inverse_HRD, variance_HR = self.inverse_HRD.double(), self.variance_HR.double()
        cost_HR = ((inverse_HRD @ moment_HDD) * inverse_HRD).sum(-1)
        lost = float((sensitivity_H[:, None] * cost_HR * variance_HR).sum())
        return lost / max(float(variance_HR.mean(0).sum()), 1e-30)

    def side_codec(self, spec: SideSpec, scale_HR: Tensor) -> SideCodec | SharedSide:
        """The codec of the channels that `spec` keeps, stored in units of `scale_HR`."""
        from kvcompress.codec.heads.codec import SideCodec

        kept = self.cut(spec.rank)
        return SideCodec(spec, kept.mean_HD, kept.basis_HDR, kept.inverse_HRD * self.moved_H11, scale_HR)


@dataclass(frozen=True)
class LayerBases:
    """What a basis method found for one layer."""

    k: LatentBasis
    v: LatentBasis

    def profile(self, statistics: LayerStatistics) -> Profile:
        """The layer as an encoding sees it."""
        k_variance_R, v_variance_R = self.k.mean_variance(), self.v.mean_variance()
        return Profile(
            len(k_variance_R),
            len(v_variance_R),
            k_variance_R,
            v_variance_R,
            self.k.weight(statistics.query_moment_HDD, statistics.key_sensitivity_H),
            self.v.weight(statistics.output_moment_HDD, statistics.value_sensitivity_H),
        )

    def codec(self, spec: Any, k: Any, v: Any) -> CacheCodec:
        """The layer's codec from its spec and its sides' codecs, which `LatentBasis.side_codec` has made."""
        from kvcompress.codec.heads.codec import HeadsCodec

        return HeadsCodec(k, v)


@dataclass(frozen=True)
class Profile:
    """One compressed layer as an encoding sees it: channels per head, and their variances (descending) once known.

    The variances of one side are comparable with each other. Multiplied by the side's weight they are comparable
    between sides and layers: their sum is the squared error that dropping all channels would leave in the layer's
    attention output, relative to the residual stream, to first order.
    """

    form: ClassVar[str] = "heads"
    """Of the layer's cache, as in `kvcompress.forms.FORMS`."""

    k_rank: int
    v_rank: int
    k_variance_R: Sequence[float] | None = None
    v_variance_R: Sequence[float] | None = None
    k_weight: float = 1.0
    v_weight: float = 1.0

    def width(self, side: str, geometry: ModelGeometry) -> int:
        """Channels of the uncompressed cache that one latent of keys ("k") or values ("v") stands for."""
        return geometry.head_dim

    def spec(self, geometry: ModelGeometry, k: SideSpec, v: SideSpec) -> CacheSpec:
        """The layer's spec, from the bands that an encoding has chosen."""
        return HeadsSpec(geometry.num_kv_heads, geometry.head_dim, k, v)


@dataclass(frozen=True)
class Outline:
    """A checkpoint as a plan sees it: its config.json, and dtype and shape of every tensor by name."""

    config: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]

    @cached_property
    def geometry(self) -> ModelGeometry:
        """Sizes of the model; raises ValueError as `ModelGeometry.from_config`."""
        return ModelGeometry.from_config(self.config)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(math.prod(shape) * DTYPE_BITS[dtype] // 8 for dtype, shape in self.tensors.values())


class Method(ABC, Generic[C]):
    """Common to all kinds. `config` is the schema of the method's stage."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    config: ClassVar[type[StageConfig]]

    @property
    def kind(self) -> Kind:
        return self.config.kind


class TransformMethod(Method[C]):
    """The checkpoint itself changes: kinds `weights`, `attention` and `heal`."""

    @abstractmethod
    def outline(self, config: C, before: Outline) -> Outline:
        """Config and tensors after the stage, from those before it.

        The bytes of all tensors together are exact, or where only data can tell, the most it will be. Where single
        shapes depend on the data, these are nominal ones and `transform` has the true ones.

        Raises:
            ValueError: the stage does not fit this model.
        """

    @abstractmethod
    def transform(self, config: C, before: Outline, context: Context) -> tuple[Transform, Outline]:
        """Do the work on `context.checkpoint`, whose outline is `before`.

        Returns:
            What replaces tensors while shards are copied, and the outline of what it comes to.
        """

    def restore(self, checkpoint: Checkpoint) -> tuple[Transform, dict[str, Any]] | None:
        """The way back: plain tensors and config of the base architecture; None where a stage left it alone."""
        return None


Needs = Literal["nothing", "statistics", "values", "states"]
"""What a basis is fitted to: nothing, moments, or besides them the values themselves, or keys (before RoPE) as well."""


class ModelBasis(Method[C]):
    """Keys and values become latents, by bases found for the whole model at once."""

    def needs(self, config: C) -> Needs:
        """What the pipeline has to capture before `fit_model`."""
        return "statistics"

    @abstractmethod
    def profiles(self, config: C, geometry: ModelGeometry, layers: Sequence[int]) -> Sequence[Profile]:
        """The layers that get a codec as an encoding sees them before any calibration.

        Their bytes are exact, or where only data can tell, the most it will be.

        Raises:
            ValueError: ranks or layers that the method cannot do.
        """

    @abstractmethod
    def fit_model(self, config: C, context: Context, profiles: Sequence[Profile]) -> dict[int, LayerBases]:
        """Bases of every layer that gets a codec.

        Args:
            profiles: what `profiles` has said of these layers.
        """

    def own_specs(self, config: C, geometry: ModelGeometry, layers: Sequence[int]) -> Sequence[CacheSpec] | None:
        """Specs of a method that stores its latents itself, so that no encoding follows; None for all others."""
        return None

    def own_codecs(self, config: C, context: Context, specs: Sequence[CacheSpec]) -> Sequence[CacheCodec]:
        """Codecs of a method that has specs of its own."""
        raise ValueError(f"{self.name} leaves its latents to an encoding")

    def fit_bytes(self, config: C, geometry: ModelGeometry, tokens: int) -> tuple[int, int]:
        """(memory, disk space) that a fit on this many calibration tokens takes at most, in bytes."""
        return 8 * 8 * geometry.num_kv_heads * geometry.head_dim**2, 0


class BasisMethod(ModelBasis[C]):
    """A basis per head, after RoPE, found layer by layer."""

    def profiles(self, config: C, geometry: ModelGeometry, layers: Sequence[int]) -> Sequence[Profile]:
        return [Profile(*self.ranks(config, geometry))] * len(layers)

    @abstractmethod
    def ranks(self, config: C, geometry: ModelGeometry) -> tuple[int, int]:
        """Channels kept per head for (keys, values), before any calibration: exact in sum over the model."""

    @abstractmethod
    def fit(self, config: C, statistics: LayerStatistics) -> tuple[LatentBasis, LatentBasis]:
        """Full-rank bases for (keys, values) of one layer; they are cut to the channels the encoding keeps."""

    def fit_model(self, config: C, context: Context, profiles: Sequence[Profile]) -> dict[int, LayerBases]:
        """Bases of every layer that gets a codec. Override where layers are not fitted one by one."""
        bases: dict[int, LayerBases] = {}
        for index, profile in zip(context.compressed_layers, profiles, strict=True):
            context.progress("fitting layers", len(bases), len(profiles))
            k, v = self.fit(config, context.statistics(index))
            bases[index] = LayerBases(k.cut(profile.k_rank), v.cut(profile.v_rank))
        return bases


class EncodingMethod(Method[C]):
    """Latents become bytes."""

    forms: ClassVar[tuple[str, ...]] = ("heads",)
    """Forms of cache it can write."""

    def specs(self, config: C, geometry: ModelGeometry, profiles: Sequence[Profile]) -> Sequence[CacheSpec]:
        """`layers` for profiles it can encode.

        Raises:
            ValueError: a basis whose latents it cannot encode, or bytes that do not fit the ranks.
        """
        for profile in profiles:
            if profile.form not in self.forms:
                raise ValueError(
                    f"{self.name} does not encode latents of form {profile.form}, which this recipe's basis makes; "
                    "use scalar"
                )
        return self.layers(config, geometry, profiles)

    @abstractmethod
    def layers(self, config: C, geometry: ModelGeometry, profiles: Sequence[Profile]) -> Sequence[CacheSpec]:
        """Specs of the compressed layers, in order.

        The bytes of all layers together depend on the config and the sizes alone; where their split also depends on
        the data, profiles with variances decide it and profiles without give a nominal one, for planning.
        """

    @abstractmethod
    def codec(self, config: C, spec: Any, bases: LayerBases) -> CacheCodec:
        """The codec of one layer: a spec that `layers` made and the bases it is for."""


def channels(share: float | int, head_dim: int) -> int:
    """A rank given as a share of head_dim (float) or as a number of channels (int), in whole channel groups.

    Raises:
        ValueError: outside (0, head_dim], or a count that is not a multiple of the group.
    """
    if isinstance(share, float):
        return max(CHANNEL_GROUP, round(share * head_dim / CHANNEL_GROUP) * CHANNEL_GROUP)
    if share > head_dim:
        raise ValueError(
            f"rank {share} is above head_dim {head_dim}; use a rank up to {head_dim} or a share such as 0.75"
        )
    if share % CHANNEL_GROUP:
        low = share // CHANNEL_GROUP * CHANNEL_GROUP
        near = " or ".join(str(rank) for rank in (low, low + CHANNEL_GROUP) if rank)
        raise ValueError(f"rank {share} is not a multiple of {CHANNEL_GROUP}; use {near}")
    return share
