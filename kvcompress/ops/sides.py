"""The bands of a side, as kernels and torch ops take them."""

from __future__ import annotations

from kvcompress.codec.bands import Band, SideSpec
from kvcompress.codec.layout import SideLayout
from kvcompress.ops.interface.common import Side


def side_struct(spec: SideSpec, place: SideLayout) -> Side:
    struct, bands = Side(), merged_bands(spec)
    struct.rank, struct.num_bands, struct.outliers = spec.rank, len(bands), spec.outliers
    for index, band in enumerate(bands):
        struct.bits[index], struct.widths[index], struct.steps[index] = band.bits, band.width, band.code.step
    struct.gain_offset, struct.outlier_offset, struct.channel_offset, struct.code_offset = place
    struct.code_bytes = spec.code_bytes
    return struct


def record_struct(spec: SideSpec) -> Side:
    """The C description of a side whose record holds a token's parts one after the other."""
    offsets, start = [], 0
    for size in spec.part_bytes:
        offsets.append(start if size else -1)
        start += size
    return side_struct(spec, SideLayout(*offsets))


def merged_bands(spec: SideSpec) -> list[Band]:
    """Neighbouring bands of one width as one: bands are whole bytes."""
    bands: list[Band] = []
    for band in spec.bands:
        if bands and bands[-1].bits == band.bits:
            bands[-1] = Band(band.bits, bands[-1].width + band.width)
        else:
            bands.append(band)
    return bands
