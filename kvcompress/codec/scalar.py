"""The scalar encoding: latents to bytes and back, one token at a time.

A latent channel is divided by its static scale (calibrated standard deviation) and by one gain per token and head,
then stored in its band's code (`codec.codes`). Channels that are floats need no gain.

Why static scales: the decoder never multiplies per channel. Scales and steps fold into the query once per decode
step (keys) or into the output once (values), and the gain multiplies one score or one probability.

Outliers: a fixed number of channels of every token and head can be stored exactly beside the codes, those whose exact
storage lowers the weighted squared error most. What is stored is what the code leaves of the channel, so a decoder
adds it without looking at the code. The idea is KVQuant's dense-and-sparse split (Hooper et al., 2024, arXiv
2401.18079), with a fixed count because a record of an append-only page has a fixed size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.codec.bands import SideSpec
from kvcompress.codec.record import Record

_GAIN_CANDIDATES = tuple(2.0 ** (i / 3) for i in range(-3, 7))
_SMALLEST_GAIN, _LARGEST_GAIN = 2.0**-14, 65504.0
_HALF_MAX = 65504.0

CLIP_THRESHOLD = 0.01
"""A token clips when codes that end too early lose this share of its weighted squares, in one head of one side."""


def encode(latent_THR: Tensor, weight_HR: Tensor, side: SideSpec) -> Record:
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
    if not side.has_gain:
        (band,) = side.bands
        return Record(None, band.code.pack(band.code.encode(latent_THR)))
    gain_TH, channel_THN = _best_gain(latent_THR, weight_HR, side)
    codes = _codes(latent_THR / gain_TH[..., None].float(), side)
    packed = [band.code.pack(code) for band, code in zip(side.bands, codes, strict=True)]
    codes_THB = torch.cat(packed, dim=-1)
    if not side.outliers:
        return Record(gain_TH, codes_THB)
    left_THR = latent_THR - _values(codes, side) * gain_TH[..., None].float()
    outlier_THN = left_THR.gather(-1, channel_THN).clamp(-_HALF_MAX, _HALF_MAX).half()
    return Record(gain_TH, codes_THB, outlier_THN, channel_THN.to(torch.uint8))


def decode(record: Record, side: SideSpec) -> Tensor:
    """Inverse of `encode` up to rounding: float32 normalized latents `[tokens, heads, rank]`."""
    gain_TH, codes_THB, outlier_THN, channel_THN = record
    packed = codes_THB.split([band.nbytes for band in side.bands], dim=-1)
    codes = [band.code.unpack(part) for band, part in zip(side.bands, packed, strict=True)]
    latent_THR = _values(codes, side)
    if gain_TH is None:
        assert not side.has_gain
        return latent_THR
    latent_THR = latent_THR * gain_TH[..., None].float()
    if outlier_THN is None or channel_THN is None:
        assert not side.outliers
        return latent_THR
    # A damaged page may name a channel that is not there; it must not stop the process.
    return latent_THR.scatter_add(-1, channel_THN.long().clamp(max=side.rank - 1), outlier_THN.float())


def clips(record: Record, latent_THR: Tensor, weight_HR: Tensor, side: SideSpec) -> Tensor:
    """Which tokens and heads clip (`CLIP_THRESHOLD`): latents and what `encode` made of them to bool `[tokens, heads]`.

    What is lost is how far channels lie beyond the outermost code; channels stored exactly lose nothing.
    """
    if record.gain_TH is None:
        return torch.zeros(latent_THR.shape[:2], dtype=torch.bool, device=latent_THR.device)
    reach_R = torch.cat([torch.full((band.width,), band.code.reach) for band in side.bands])
    reach_THR = record.gain_TH[..., None].float() * reach_R.to(latent_THR.device)
    beyond_THR = (latent_THR.abs() - reach_THR).clamp_min(0.0)
    if record.channel_THN is not None:
        beyond_THR = beyond_THR.scatter(-1, record.channel_THN.long(), 0.0)
    lost_TH = (weight_HR * beyond_THR.square()).sum(-1)
    return lost_TH > CLIP_THRESHOLD * (weight_HR * latent_THR.square()).sum(-1)


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
        value_THR = _values(_codes(latent_THR / candidate, side), side)
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


def _codes(unit_THR: Tensor, side: SideSpec) -> list[Tensor]:
    """Code numbers of each band."""
    bands = unit_THR.split([band.width for band in side.bands], dim=-1)
    return [band.code.encode(unit) for band, unit in zip(side.bands, bands, strict=True)]


def _values(codes: Sequence[Tensor], side: SideSpec) -> Tensor:
    """What the code numbers of each band stand for, in one."""
    values = [band.code.decode(code) for band, code in zip(side.bands, codes, strict=True)]
    return values[0] if len(values) == 1 else torch.cat(values, dim=-1)
