"""The scalar encoding: latents to bytes and back, one token at a time.

A latent channel is divided by its static scale (calibrated standard deviation) and by one gain per token and head,
then rounded to a symmetric mid-rise uniform quantizer whose step is the mean-square optimum for a Gaussian
(J. Max, Quantizing for Minimum Distortion, 1960). A code c of b bits stands for (c - (2^b - 1) / 2) * step.
16- and 32-bit channels are IEEE floats and need no gain.

Why static scales: the decoder never multiplies per channel. Scales and steps fold into the query once per decode
step (keys) or into the output once (values), and the gain multiplies one score or one probability.

Outliers: a fixed number of channels of every token and head can be stored exactly beside the codes, those whose exact
storage lowers the weighted squared error most. What is stored is what the code leaves of the channel, so a decoder
adds it without looking at the code. The idea is KVQuant's dense-and-sparse split (Hooper et al., 2024, arXiv
2401.18079), with a fixed count because a record of an append-only page has a fixed size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress.codec.bands import STEP, Band, SideSpec
from kvcompress.codec.codes.packing import pack, unpack

_GAIN_CANDIDATES = tuple(2.0 ** (i / 3) for i in range(-3, 7))
_SMALLEST_GAIN, _LARGEST_GAIN = 2.0**-14, 65504.0
_HALF_MAX = 65504.0

CLIP_THRESHOLD = 0.01
"""A token clips when codes that end too early lose this share of its weighted squares, in one head of one side."""


class Encoded(NamedTuple):
    """Tokens of one side as they are stored."""

    gain_TH: Tensor | None
    """float16; None for channels that are floats."""
    codes_THB: Tensor
    """uint8."""
    outlier_THN: Tensor | None = None
    """float16: what the codes leave of the exact channels, in units of the static scale; None without outliers."""
    channel_THN: Tensor | None = None
    """uint8."""

    def to_parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """Bytes `[tokens, heads, width]` of each part, in the order of `SideSpec.part_bytes`."""
        gain_TH1 = None if self.gain_TH is None else self.gain_TH[..., None]
        return _bytes_of(gain_TH1), _bytes_of(self.outlier_THN), self.channel_THN, self.codes_THB

    @classmethod
    def from_parts(cls, parts: Iterable[Tensor | None]) -> Encoded:
        """Inverse of `to_parts`."""
        gain, outliers, channels, codes = parts
        assert codes is not None
        gain_TH = None if gain is None else _halves_of(gain).squeeze(-1)
        return cls(gain_TH, codes, None if outliers is None else _halves_of(outliers), channels)

    def heads(self, start: int, stop: int) -> Encoded:
        """Heads [start, stop)."""
        parts = [None if part is None else part[:, start:stop] for part in self]
        return Encoded(parts[0], self.codes_THB[:, start:stop], *parts[2:])

    @classmethod
    def concatenate(cls, heads: Sequence[Encoded]) -> Encoded:
        """The heads of several, one after the other."""
        parts = [None if part[0] is None else torch.cat(part, dim=1) for part in zip(*heads, strict=True)]
        codes_THB = torch.cat([head.codes_THB for head in heads], dim=1)
        return cls(parts[0], codes_THB, *parts[2:])

    def to_record(self) -> Tensor:
        """All parts of a token and head in one row of bytes `[tokens, heads, bytes]`."""
        return torch.cat([part for part in self.to_parts() if part is not None], dim=-1)

    @classmethod
    def from_record(cls, record_THX: Tensor, side: SideSpec) -> Encoded:
        """Inverse of `to_record`."""
        parts = record_THX.split(side.part_bytes, dim=-1)
        return cls.from_parts(part if part.shape[-1] else None for part in parts)


def encode(latent_THR: Tensor, weight_HR: Tensor, side: SideSpec) -> Encoded:
    """Encode normalized latents (already divided by their static scale).

    The gain is chosen per token and head to minimise the weighted squared error *including clipping* over a small grid
    around the root mean square, then refined in closed form: a token with one extreme channel (an attention sink)
    clips under the root mean square. Outliers are chosen together with it: at every gain of the grid, the channels
    with the largest errors leave the sum. A gain chosen for all channels first would be the outliers' compromise, at
    which every channel is bad and the wrong ones look worst.

    Args:
        latent_THR: float32 `[tokens, heads, rank]`.
        weight_HR: importance of each channel's squared error (its calibrated variance) `[heads, rank]`.
        side: bands; their widths add up to rank.
    """
    assert latent_THR.shape[-1] == side.rank, (latent_THR.shape, side)
    latent_THR = torch.nan_to_num(latent_THR.float(), nan=0.0, posinf=_HALF_MAX, neginf=-_HALF_MAX)
    if side.bands[0].bits == 32:
        return Encoded(None, latent_THR.contiguous().view(torch.uint8))
    if side.bands[0].bits == 16:
        return Encoded(None, latent_THR.clamp(-_HALF_MAX, _HALF_MAX).half().contiguous().view(torch.uint8))
    gain_TH, channel_THN = _best_gain(latent_THR, weight_HR, side)
    code_THR = _quantize(latent_THR / gain_TH[..., None].float(), side)
    packed = [pack(code_THR[..., start:stop], band.bits) for band, start, stop in band_slices(side)]
    codes_THB = torch.cat(packed, dim=-1)
    if not side.outliers:
        return Encoded(gain_TH, codes_THB)
    left_THR = latent_THR - _values(code_THR, side) * gain_TH[..., None].float()
    outlier_THN = left_THR.gather(-1, channel_THN).clamp(-_HALF_MAX, _HALF_MAX).half()
    return Encoded(gain_TH, codes_THB, outlier_THN, channel_THN.to(torch.uint8))


def decode(encoded: Encoded, side: SideSpec) -> Tensor:
    """Inverse of `encode` up to rounding: float32 normalized latents `[tokens, heads, rank]`."""
    gain_TH, codes_THB, outlier_THN, channel_THN = encoded
    if not side.has_gain:
        dtype = torch.float16 if side.bands[0].bits == 16 else torch.float32
        return codes_THB.contiguous().view(dtype).float()
    assert gain_TH is not None
    parts, offset = [], 0
    for band in side.bands:
        size = band.bits * band.width // 8
        parts.append(_value(unpack(codes_THB[..., offset : offset + size], band.bits), band.bits))
        offset += size
    latent_THR = torch.cat(parts, dim=-1) * gain_TH[..., None].float()
    if outlier_THN is None or channel_THN is None:
        assert not side.outliers
        return latent_THR
    # A damaged page may name a channel that is not there; it must not stop the process.
    return latent_THR.scatter_add(-1, channel_THN.long().clamp(max=side.rank - 1), outlier_THN.float())


def clips(encoded: Encoded, latent_THR: Tensor, weight_HR: Tensor, side: SideSpec) -> Tensor:
    """Which tokens and heads clip (`CLIP_THRESHOLD`): latents and what `encode` made of them to bool `[tokens, heads]`.

    What is lost is how far channels lie beyond the outermost code; channels stored exactly lose nothing.
    """
    if encoded.gain_TH is None:
        return torch.zeros(latent_THR.shape[:2], dtype=torch.bool, device=latent_THR.device)
    largest_R = torch.cat(
        [torch.full((band.width,), _value(torch.tensor(2**band.bits - 1), band.bits).item()) for band in side.bands]
    )
    reach_THR = encoded.gain_TH[..., None].float() * largest_R.to(latent_THR.device)
    beyond_THR = (latent_THR.abs() - reach_THR).clamp_min(0.0)
    if encoded.channel_THN is not None:
        beyond_THR = beyond_THR.scatter(-1, encoded.channel_THN.long(), 0.0)
    lost_TH = (weight_HR * beyond_THR.square()).sum(-1)
    return lost_TH > CLIP_THRESHOLD * (weight_HR * latent_THR.square()).sum(-1)


def band_slices(side: SideSpec) -> Iterator[tuple[Band, int, int]]:
    """Each band with the channels it covers, as (band, start, stop)."""
    start = 0
    for band in side.bands:
        yield band, start, start + band.width
        start += band.width


def _bytes_of(halves: Tensor | None) -> Tensor | None:
    return None if halves is None else halves.contiguous().view(torch.uint8)


def _halves_of(stored: Tensor) -> Tensor:
    # A copy: a slice of a record may be contiguous and still begin at an odd byte.
    return stored.clone(memory_format=torch.contiguous_format).view(torch.float16)


def _best_gain(latent_THR: Tensor, weight_HR: Tensor, side: SideSpec) -> tuple[Tensor, Tensor]:
    """gain_TH in float16 and the channels `[tokens, heads, outliers]` that are stored exactly, int64."""
    square_THR = latent_THR.square()
    best_channel = _largest(square_THR, side.outliers)
    rest = square_THR.scatter(-1, best_channel, 0.0).sum(-1, keepdim=True) / (side.rank - side.outliers)
    rms_TH1 = rest.sqrt().clamp_min(_SMALLEST_GAIN)
    best_error = torch.full_like(rms_TH1, torch.inf)
    best_gain = rms_TH1.clone()
    for factor in _GAIN_CANDIDATES:
        candidate = rms_TH1 * factor
        value_THR = _values(_quantize(latent_THR / candidate, side), side)
        weight_THR = weight_HR
        if side.outliers:
            channel = _largest(weight_HR * (latent_THR - candidate * value_THR).square(), side.outliers)
            weight_THR = weight_HR.expand_as(latent_THR).scatter(-1, channel, 0.0)
        energy = (weight_THR * value_THR.square()).sum(-1, keepdim=True)
        # Codes fixed, the error is quadratic in the gain: its minimum is one division away.
        refined = (weight_THR * value_THR * latent_THR).sum(-1, keepdim=True) / energy
        refined = refined.clamp(_SMALLEST_GAIN, _LARGEST_GAIN).half().float()
        error = (weight_THR * (latent_THR - refined * value_THR).square()).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_gain = torch.where(better, refined, best_gain)
        if side.outliers:
            best_channel = torch.where(better, channel, best_channel)
    return best_gain.squeeze(-1).clamp(_SMALLEST_GAIN, _LARGEST_GAIN).half(), best_channel


def _largest(x_THR: Tensor, count: int) -> Tensor:
    """Channels of the `count` largest entries, of equal ones the first `[tokens, heads, count]`."""
    found = []
    for _ in range(count):
        found.append(x_THR.argmax(-1, keepdim=True))
        x_THR = x_THR.scatter(-1, found[-1], -1.0)
    return torch.cat(found, dim=-1) if found else x_THR.new_empty((*x_THR.shape[:-1], 0), dtype=torch.int64)


def _quantize(unit_THR: Tensor, side: SideSpec) -> Tensor:
    parts = []
    for band, start, stop in band_slices(side):
        top = 2**band.bits - 1
        parts.append((unit_THR[..., start:stop] / STEP[band.bits] + top / 2).round().clamp_(0, top))
    return torch.cat(parts, dim=-1)


def _values(code_THR: Tensor, side: SideSpec) -> Tensor:
    return torch.cat([_value(code_THR[..., start:stop], band.bits) for band, start, stop in band_slices(side)], dim=-1)


def _value(code: Tensor, bits: int) -> Tensor:
    value: Tensor = (code.float() - (2**bits - 1) / 2) * STEP[bits]
    return value
