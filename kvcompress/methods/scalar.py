"""Scalar encoding: latent channels in 16, 8, 4 or 2 bits, dropped where they are worth none.

Three ways to say how many: `bits` (one width for every kept channel), `bands` (explicit), or
`target_bits_per_channel`, which spends an exact budget by reverse water-filling over groups of 8 channels (Cover &
Thomas, 10.3.3) with the measured error of the quantizer at each width. `codec.scalar` has the quantizer itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kvcompress.codec.spec import CHANNEL_GROUP, EXPECTED_ERROR, Band, CacheSpec, SideSpec
from kvcompress.geometry import ModelGeometry
from kvcompress.methods.base import EncodingMethod, LayerBases, Profile
from kvcompress.recipe import Kind, StageConfig

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.codec.forms import CacheCodec

Bits = Literal[16, 8, 4, 2]
BandList = list[tuple[Literal[8, 4, 2], Annotated[int, Field(gt=0, multiple_of=CHANNEL_GROUP)]]]
Target = Annotated[float, Field(gt=0.0, le=8.0)]

_SCALE_FLOOR = 1e-4
"""Smallest static scale, as a share of the head's largest: a channel that never moved still needs a unit."""

_UNIT = 2 * CHANNEL_GROUP
"""Bits by which a group's cost changes: 8 channels at 2 bits."""


class _Pair(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BitsPair(_Pair):
    k: Bits
    v: Bits


class BandsPair(_Pair):
    k: BandList
    v: BandList


class TargetPair(_Pair):
    k: Target
    v: Target


class ScalarConfig(StageConfig):
    kind: ClassVar[Kind] = "encoding"
    method: Literal["scalar"] = "scalar"
    bits: BitsPair | None = Field(None, description="one code width for every kept channel: 16, 8, 4 or 2")
    bands: BandsPair | None = Field(
        None, description="lists of [bits, channels], most bits first, e.g. [[8, 16], [4, 32]]"
    )
    target_bits_per_channel: TargetPair | None = Field(
        None, description="average bits per channel of head_dim, spent where the variance is"
    )

    @field_validator("bits", "target_bits_per_channel", mode="before")
    @classmethod
    def _same_for_both(cls, value: Any) -> Any:
        return {"k": value, "v": value} if isinstance(value, (int, float)) else value

    @model_validator(mode="after")
    def _exactly_one(self) -> ScalarConfig:
        given = [name for name in ("bits", "bands", "target_bits_per_channel") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"give exactly one of bits, bands, target_bits_per_channel; found {found}")
        if self.bands is not None:
            for bands in (self.bands.k, self.bands.v):
                SideSpec(tuple(Band(*band) for band in bands))
        return self


class Scalar(EncodingMethod[ScalarConfig]):
    name = "scalar"
    summary = "Uniform 8/4/2-bit codes with static channel scales and one gain per token and head; 16 for no loss"
    paper = "Max 1960 (quantizer); reverse water-filling, Cover & Thomas 10.3.3"
    config = ScalarConfig
    forms = ("per_head", "shared")

    def layers(self, config: ScalarConfig, geometry: ModelGeometry, profiles: Sequence[Profile]) -> list[CacheSpec]:
        return [
            layer.spec(
                geometry,
                side_spec(config, "k", layer.k_rank, layer.width("k", geometry), layer.k_variance_R),
                side_spec(config, "v", layer.v_rank, layer.width("v", geometry), layer.v_variance_R),
            )
            for layer in profiles
        ]

    def codec(self, config: ScalarConfig, spec: Any, bases: LayerBases) -> CacheCodec:
        k, v = (
            basis.side_codec(side, _scale(basis.variance_HR)[:, : side.rank].contiguous())
            for side, basis in ((spec.k, bases.k), (spec.v, bases.v))
        )
        return bases.codec(spec, k, v)


def side_spec(
    config: ScalarConfig, side: str, rank: int, head_dim: int, variance_R: Sequence[float] | None = None
) -> SideSpec:
    """Bands for keys ("k") or values ("v") over at most `rank` channels; without variances, a nominal choice.

    Args:
        head_dim: channels of the uncompressed cache that they stand for.
    """
    if config.bits is not None:
        return SideSpec((Band(getattr(config.bits, side), rank),))
    if config.bands is not None:
        spec = SideSpec(tuple(Band(*band) for band in getattr(config.bands, side)))
        if spec.rank > rank:
            raise ValueError(
                f"scalar: bands.{side} cover {spec.rank} channels, but the basis keeps {rank} of {head_dim}; "
                "shorten the bands or raise the rank"
            )
        return spec
    assert config.target_bits_per_channel is not None
    return _water_fill(getattr(config.target_bits_per_channel, side), rank, head_dim, variance_R)


def _water_fill(target: float, rank: int, head_dim: int, variance_R: Sequence[float] | None) -> SideSpec:
    """Bands with the least expected squared error that spend exactly the budget."""
    groups = rank // CHANNEL_GROUP
    units = round(target * head_dim / _UNIT)
    if not 1 <= units <= 4 * groups:
        low, high = _UNIT / head_dim, 8.0 * rank / head_dim
        raise ValueError(
            f"scalar: target_bits_per_channel {target} cannot be met with {rank} of {head_dim} channels; "
            f"expected {low:g} to {high:g}"
        )
    if units == 4 * groups - 1:
        units -= 1  # three units have no code width, so one below the top cannot be spent
    # Nominal profile for planning: any strictly falling one gives a split of the same size.
    variances = variance_R or [0.9**channel for channel in range(rank)]
    energy = [sum(variances[g * CHANNEL_GROUP : (g + 1) * CHANNEL_GROUP]) for g in range(groups)]
    prefix = [0.0, *itertools.accumulate(energy)]

    def error(n8: int, n4: int, n2: int) -> float:
        ends = (n8, n8 + n4, n8 + n4 + n2)
        parts = (prefix[ends[0]], prefix[ends[1]] - prefix[ends[0]], prefix[ends[2]] - prefix[ends[1]])
        kept = sum(EXPECTED_ERROR[bits] * part for bits, part in zip((8, 4, 2), parts, strict=True))
        return kept + prefix[-1] - prefix[ends[2]]

    # Few enough to try them all: how many groups get 8 and 4 bits fixes how many get 2.
    splits = (
        (n8, n4, units - 4 * n8 - 2 * n4) for n8 in range(units // 4 + 1) for n4 in range((units - 4 * n8) // 2 + 1)
    )
    counts = min((split for split in splits if sum(split) <= groups), key=lambda split: error(*split))
    return SideSpec(tuple(Band(bits, n * CHANNEL_GROUP) for bits, n in zip((8, 4, 2), counts, strict=True) if n))


def _scale(variance_HR: Tensor) -> Tensor:
    import torch

    deviation_HR = variance_HR.sqrt()
    largest = deviation_HR.amax(-1, keepdim=True)
    return torch.where(largest > 0, torch.maximum(deviation_HR, _SCALE_FLOOR * largest), torch.ones_like(deviation_HR))
