"""What a method is to the pipeline. Method modules import torch inside functions only: `plan` runs without it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from kvcompress.codec.spec import CHANNEL_GROUP, SideSpec
from kvcompress.geometry import ModelGeometry
from kvcompress.recipe import Kind, StageConfig

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.calibration.statistics import LayerStatistics

C = TypeVar("C", bound=StageConfig)


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


class Method(ABC, Generic[C]):
    """Common to all kinds. `config` is the schema of the method's stage."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    config: ClassVar[type[StageConfig]]

    @property
    def kind(self) -> Kind:
        return self.config.kind


class BasisMethod(Method[C]):
    """Keys and values become latents."""

    @abstractmethod
    def ranks(self, config: C, geometry: ModelGeometry) -> tuple[int, int]:
        """Channels kept per head for (keys, values), known before any calibration."""

    @abstractmethod
    def fit(self, config: C, statistics: LayerStatistics) -> tuple[LatentBasis, LatentBasis]:
        """Full-rank bases for (keys, values) of one layer; the encoding cuts them to the channels it keeps."""


class EncodingMethod(Method[C]):
    """Latents become bytes."""

    @abstractmethod
    def spec(self, config: C, side: str, rank: int, head_dim: int, variance_R: list[float] | None = None) -> SideSpec:
        """Bands for keys ("k") or values ("v") over at most `rank` channels.

        The bytes depend on the config and the sizes alone; where the bands also depend on the data, `variance_R`
        (descending) decides them and None gives a nominal choice of the same size, for planning.
        """


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
