"""What a method is to the pipeline. Method modules import torch inside functions only: `plan` runs without it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import Field

from kvcompress.codec.spec import CHANNEL_GROUP, CacheSpec
from kvcompress.geometry import ModelGeometry
from kvcompress.recipe import Kind, StageConfig
from kvcompress.training import MICRO_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.calibration.statistics import LayerStatistics
    from kvcompress.checkpoint.writer import Transform
    from kvcompress.codec.forms import CacheCodec
    from kvcompress.methods.context import Context

C = TypeVar("C", bound=StageConfig)


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


@dataclass(frozen=True)
class LayerBases:
    """What a basis method found for one layer."""

    k: LatentBasis
    v: LatentBasis


@dataclass(frozen=True)
class Profile:
    """One compressed layer as an encoding sees it: channels per head, and their variances (descending) once known."""

    k_rank: int
    v_rank: int
    k_variance_R: Sequence[float] | None = None
    v_variance_R: Sequence[float] | None = None


@dataclass(frozen=True)
class Outline:
    """A checkpoint as a plan sees it: its config.json, and dtype and shape of every tensor by name."""

    config: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]


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
        """Config and tensors after the stage, from those before it. Sizes are exact, whatever the data.

        Raises:
            ValueError: the stage does not fit this model.
        """

    @abstractmethod
    def transform(self, config: C, context: Context) -> Transform:
        """Do the work on `context.checkpoint`; what comes back replaces tensors while shards are copied."""


class BasisMethod(Method[C]):
    """Keys and values become latents."""

    @abstractmethod
    def ranks(self, config: C, geometry: ModelGeometry) -> tuple[int, int]:
        """Channels kept per head for (keys, values), before any calibration: exact in sum over the model."""

    @abstractmethod
    def fit(self, config: C, statistics: LayerStatistics) -> tuple[LatentBasis, LatentBasis]:
        """Full-rank bases for (keys, values) of one layer; they are cut to the channels the encoding keeps."""

    def fit_model(self, config: C, context: Context) -> dict[int, LayerBases]:
        """Bases of every layer that gets a codec. Override where layers are not fitted one by one."""
        k_rank, v_rank = self.ranks(config, context.geometry)
        bases = {}
        for done, index in enumerate(context.compressed_layers):
            context.progress("fitting layers", done, len(context.compressed_layers))
            k, v = self.fit(config, context.statistics(index))
            bases[index] = LayerBases(k.cut(k_rank), v.cut(v_rank))
        return bases


class EncodingMethod(Method[C]):
    """Latents become bytes."""

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
