"""Bands of channels: which channels of keys or values are kept and in how many bits. No torch.

Source of the form: transform coding; an orthogonal basis orders channels by variance and bits follow by reverse
water-filling (Cover & Thomas, Elements of Information Theory, 10.3). Rank truncation is the special case of 0 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from kvcompress.codec.codes.code import Code, Processor
from kvcompress.codec.codes.registry import CODES, widths

CHANNEL_GROUP = 8
"""Channels are kept and packed in groups of this size, so that every band is a whole number of bytes."""

GAIN_BYTES = 2
"""One IEEE half per token, head and side, where any band is quantized."""

MAX_OUTLIERS = 2
"""Channels per token, head and side that can be stored exactly beside the codes."""

OUTLIER_VALUE_BYTES, OUTLIER_CHANNEL_BYTES = 2, 1
"""An exact channel: what its code leaves of it, as an IEEE half in units of the static scale, and its number."""


class Band(NamedTuple):
    """`width` neighbouring channels stored in `bits` bits each."""

    bits: int
    width: int

    @property
    def code(self) -> Code:
        return CODES[self.bits]

    @property
    def nbytes(self) -> int:
        """Bytes per token and head."""
        return self.bits * self.width // 8


def summary(bands: Sequence[Band], width: int) -> dict[str, Any]:
    """Bands as plan and manifest show them; `width` is the channels of the uncompressed cache that they stand for."""
    return {
        "rank": sum(band.width for band in bands),
        "bits": round(8 * sum(band.nbytes for band in bands) / width, 4),
        "bands": [list(band) for band in bands],
    }


@dataclass(frozen=True)
class SideSpec:
    """Keys or values of one layer: bands over the kept channels, most bits first.

    `outliers` channels of every token and head are stored exactly: what their codes leave of them is stored, too.
    """

    bands: tuple[Band, ...]
    outliers: int = 0

    def __post_init__(self) -> None:
        if not self.bands:
            raise ValueError("a codec keeps at least one band of channels; found none")
        for bits, width in self.bands:
            if bits not in CODES:
                raise ValueError(f"found a band of {bits} bits; expected one of {widths()}")
            if width <= 0 or width % CHANNEL_GROUP:
                raise ValueError(f"found a band of {width} channels; expected a positive multiple of {CHANNEL_GROUP}")
        found = [band.bits for band in self.bands]
        if sorted(found, reverse=True) != found:
            raise ValueError(f"bands must go from most to fewest bits, because channels do; found {found}")
        alone = next((band.bits for band in self.bands if not band.code.has_gain), None)
        if alone and len(found) > 1:
            raise ValueError(f"a {alone}-bit band stands alone: it has no gain to share with quantized bands")
        if not 0 <= self.outliers <= MAX_OUTLIERS:
            raise ValueError(f"found {self.outliers} outliers per token and head; expected 0 to {MAX_OUTLIERS}")
        if self.outliers and alone:
            raise ValueError(f"{alone}-bit channels are exact; found {self.outliers} outliers beside them, expected 0")
        if self.outliers and self.rank > 256:
            raise ValueError(f"an outlier's channel number is one byte; found {self.rank} channels, expected up to 256")

    @property
    def rank(self) -> int:
        """Channels kept."""
        return sum(band.width for band in self.bands)

    def cut(self, share: float, widest: int) -> SideSpec:
        """The first channels: a share of those kept, in whole groups, at least one; none in more than `widest` bits."""
        left = max(CHANNEL_GROUP, round(share * self.rank / CHANNEL_GROUP) * CHANNEL_GROUP)
        bands: list[Band] = []
        for stored, width in self.bands:
            bits, kept = min(stored, widest), min(width, left)
            left -= kept
            if bands and bands[-1].bits == bits:
                bands[-1] = Band(bits, bands[-1].width + kept)
            elif kept:
                bands.append(Band(bits, kept))
        return SideSpec(tuple(bands), self.outliers)

    @property
    def has_gain(self) -> bool:
        return self.bands[0].code.has_gain

    def unpacked_by(self, processor: Processor) -> bool:
        """Whether a processor's kernels know the codes of all bands."""
        return all(processor in band.code.kernels for band in self.bands)

    @property
    def code_bytes(self) -> int:
        """Bytes of codes per token and head."""
        return sum(band.nbytes for band in self.bands)

    @property
    def part_bytes(self) -> tuple[int, int, int, int]:
        """Bytes per token and head of gain, outliers, their channel numbers and codes, which are stored in this order.

        0 for a part that is absent.
        """
        return (
            GAIN_BYTES if self.has_gain else 0,
            OUTLIER_VALUE_BYTES * self.outliers,
            OUTLIER_CHANNEL_BYTES * self.outliers,
            self.code_bytes,
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token and head, gain and outliers included."""
        return sum(self.part_bytes)

    def summary(self, width: int) -> dict[str, Any]:
        """The module's `summary`, and outliers."""
        return {**summary(self.bands, width), "outliers": self.outliers}

    def to_json(self) -> dict[str, Any]:
        bands = [list(band) for band in self.bands]
        return {"bands": bands, "outliers": self.outliers} if self.outliers else {"bands": bands}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        bands = tuple(Band(int(bits), int(width)) for bits, width in data["bands"])
        return cls(bands, int(data.get("outliers", 0)))
