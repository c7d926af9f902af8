"""Scalar encoding: latent channels in codes of few bits or in floats, dropped where they are worth none.

Three ways to say how many: `bits` (one width for every kept channel), `bands` (explicit), or
`target_bits_per_channel`, which spends an exact budget by reverse water-filling over groups of 8 channels (Cover &
Thomas, 10.3.3) with the expected error of the code at each width: for keys and values of every layer apart, or one
budget for the whole model, where the error that counts is that of the residual stream (`Profile`).
`outliers` channels of every token and head are stored exactly beside their codes. `codec.codes` has the codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from kvcompress.codec.bands import CHANNEL_GROUP, Band, SideSpec
from kvcompress.codec.codes.registry import CODES, listed, quantized, widths
from kvcompress.codec.spec import CacheSpec
from kvcompress.geometry import ModelGeometry
from kvcompress.methods.base import EncodingMethod, LayerBases, Profile
from kvcompress.methods.widths import QuantizedWidth, Width
from kvcompress.recipe import Kind, Pair, StageConfig

if TYPE_CHECKING:
    from kvcompress.codec.contract import CacheCodec

BandList = list[tuple[QuantizedWidth, Annotated[int, Field(gt=0, multiple_of=CHANNEL_GROUP)]]]
Target = Annotated[float, Field(gt=0.0, le=float(max(quantized())))]


class BitsPair(Pair):
    k: Width
    v: Width


class BandsPair(Pair):
    k: BandList
    v: BandList


class TargetPair(Pair):
    k: Target
    v: Target


TargetOrPair = Annotated[
    Annotated[Target, Tag("model")] | Annotated[TargetPair, Tag("sides")],
    Discriminator(lambda value: "sides" if isinstance(value, (dict, TargetPair)) else "model"),
]
"""Told apart before they are checked, so that a mistake in one is not reported as a mistake in the other."""


class OutliersPair(Pair):
    k: Literal[0, 1, 2]
    v: Literal[0, 1, 2]


class ScalarConfig(StageConfig):
    kind: ClassVar[Kind] = "encoding"
    method: Literal["scalar"] = "scalar"
    bits: BitsPair | None = Field(None, description=f"one code width for every kept channel: {listed(widths())}")
    bands: BandsPair | None = Field(
        None, description="lists of [bits, channels], most bits first, e.g. [[8, 16], [4, 32]]"
    )
    target_bits_per_channel: TargetOrPair | None = Field(
        None,
        description="average bits per channel of head_dim: a number for the whole model, spent where they lower the "
        "model's error most, or k and v for every layer apart",
    )
    outliers: OutliersPair = Field(
        OutliersPair(k=0, v=0), description="channels per token and head stored exactly: 0, 1 or 2, 3 bytes each"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> ScalarConfig:
        given = [name for name in ("bits", "bands", "target_bits_per_channel") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"give exactly one of bits, bands, target_bits_per_channel; found {found}")
        for side in ("k", "v"):
            if self.bands is not None:
                SideSpec(tuple(Band(*band) for band in getattr(self.bands, side)))
            if self.bits is not None:
                SideSpec((Band(getattr(self.bits, side), CHANNEL_GROUP),), getattr(self.outliers, side))
        return self


class Scalar(EncodingMethod[ScalarConfig]):
    name = "scalar"
    summary = (
        f"{listed(quantized())}-bit codes with static scales, a gain and exact outliers per token and head; "
        f"{listed(sorted(set(widths()) - set(quantized())))}: floats"
    )
    paper = "Max 1960 (quantizer); reverse water-filling, Cover & Thomas 10.3.3"
    config = ScalarConfig
    forms = ("heads", "shared")

    def layers(self, config: ScalarConfig, geometry: ModelGeometry, profiles: Sequence[Profile]) -> list[CacheSpec]:
        if isinstance(config.target_bits_per_channel, float):
            if any(layer.form != "heads" for layer in profiles):
                raise ValueError(
                    "scalar: one target_bits_per_channel for the whole model needs a basis per layer and head; give "
                    "target_bits_per_channel for k and v"
                )
            bands = iter(_joint_bands(config.target_bits_per_channel, geometry.head_dim, profiles))
            return [
                layer.spec(geometry, SideSpec(next(bands), config.outliers.k), SideSpec(next(bands), config.outliers.v))
                for layer in profiles
            ]
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
            basis.side_codec(side, basis.scale_HR()[:, : side.rank].contiguous())
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
    outliers = getattr(config.outliers, side)
    if config.bits is not None:
        return SideSpec((Band(getattr(config.bits, side), rank),), outliers)
    if config.bands is not None:
        spec = SideSpec(tuple(Band(*band) for band in getattr(config.bands, side)), outliers)
        if spec.rank > rank:
            raise ValueError(
                f"scalar: bands.{side} cover {spec.rank} channels, but the basis keeps {rank} of {head_dim}; "
                "shorten the bands or raise the rank"
            )
        return spec
    assert isinstance(config.target_bits_per_channel, TargetPair)
    target = getattr(config.target_bits_per_channel, side)
    units, found = _units(target, head_dim, [rank // CHANNEL_GROUP]), _splits(rank, variance_R)
    # Not every number can be spent: widths of 8, 4 and 2 bits leave one unit below the top.
    return SideSpec(found[max(spent for spent in found if spent <= units)][0], outliers)


def _unit() -> int:
    """Bits by which the cost of a group of channels changes."""
    return CHANNEL_GROUP * math.gcd(*quantized())


def _units(target: float, head_dim: int, groups: Sequence[int]) -> int:
    """The budget of sides with so many channel groups each, in `_unit`s.

    Raises:
        ValueError: less than the narrowest code for a group of every side, or more than the widest for all groups.
    """
    bits = round(target * head_dim * len(groups) / _unit()) * _unit()
    widths = [width * CHANNEL_GROUP for width in quantized()]
    if not widths[-1] * len(groups) <= bits <= widths[0] * sum(groups):
        kept, all_channels = CHANNEL_GROUP * sum(groups), head_dim * len(groups)
        raise ValueError(
            f"scalar: target_bits_per_channel {target} cannot be met with {kept} of {all_channels} channels; "
            f"expected {widths[-1] / head_dim:g} to {quantized()[0] * kept / all_channels:g}"
        )
    return bits // _unit()


def _splits(rank: int, variance_R: Sequence[float] | None) -> dict[int, tuple[tuple[Band, ...], float]]:
    """For every number of units that can be spent, the bands with the least expected squared error, and that error."""
    import numpy as np

    groups, widths = rank // CHANNEL_GROUP, quantized()
    # Nominal profile for planning: any strictly falling one gives a split of the same size.
    variances = np.asarray(variance_R or [0.9**channel for channel in range(rank)], np.float64)
    energy = np.concatenate([[0.0], variances.reshape(groups, CHANNEL_GROUP).sum(1).cumsum()])
    # Few enough to try them all: how many groups get each code, most bits first.
    counts = np.zeros((0, 1), np.int64)
    for _ in widths:
        left = groups - counts.sum(0)
        counts = np.vstack([counts.repeat(left + 1, axis=1), np.concatenate([np.arange(n + 1) for n in left])])
    ends = np.concatenate([np.zeros_like(counts[:1]), counts.cumsum(0)])
    error = energy[-1] - energy[ends[-1]]
    for bits, start, stop in zip(widths, ends[:-1], ends[1:], strict=True):
        error = error + CODES[bits].expected_error * (energy[stop] - energy[start])
    units = np.array(widths) * CHANNEL_GROUP // _unit() @ counts
    best: dict[int, tuple[tuple[Band, ...], float]] = {}
    for chosen in np.lexsort((error, units)).tolist():
        if units[chosen] and int(units[chosen]) not in best:
            found = zip(widths, counts[:, chosen].tolist(), strict=True)
            bands = tuple(Band(bits, n * CHANNEL_GROUP) for bits, n in found if n)
            best[int(units[chosen])] = (bands, float(error[chosen]))
    return best


def _joint_bands(target: float, head_dim: int, profiles: Sequence[Profile]) -> list[tuple[Band, ...]]:
    """Bands of every layer's keys and values, in turn, that spend one budget with the least error altogether.

    Each side's least error at every size is known (`_splits`), in parts of the residual stream; sizes that add
    up to the budget are found by dynamic programming over the sides, which is exact.
    """
    import numpy as np

    sides = [
        (rank, variance_R, weight)
        for layer in profiles
        for rank, variance_R, weight in (
            (layer.k_rank, layer.k_variance_R, layer.k_weight),
            (layer.v_rank, layer.v_variance_R, layer.v_weight),
        )
    ]
    budget = _units(target, head_dim, [rank // CHANNEL_GROUP for rank, _, _ in sides])
    tables = [_splits(rank, variance_R) for rank, variance_R, _ in sides]
    least = np.full(budget + 1, np.inf)  # error of the sides so far, by units spent
    least[0] = 0.0
    choices = []
    for table, (_, _, weight) in zip(tables, sides, strict=True):
        cost = np.full(max(table) + 1, np.inf)
        for units, (_, error) in table.items():
            cost[units] = weight * error
        before = np.concatenate([np.full(len(cost) - 1, np.inf), least])
        # Row b: the errors of spending b - u so far and u here, for u = 0, 1, ...
        total = np.lib.stride_tricks.sliding_window_view(before, len(cost))[:, ::-1] + cost
        choices.append(total.argmin(1))
        least = total.min(1)
    # As near to it as widths allow.
    budget = int(np.isfinite(least).nonzero()[0].max())
    spent = []
    for choice in reversed(choices):
        spent.append(int(choice[budget]))
        budget -= spent[-1]
    return [table[units][0] for table, units in zip(tables, reversed(spent), strict=True)]
