"""The scalar encoding: latents to bytes and back, one token at a time.

A latent channel is divided by its static scale (calibrated standard deviation) and by one gain per token and head,
then rounded to a symmetric mid-rise uniform quantizer whose step is the mean-square optimum for a Gaussian
(J. Max, Quantizing for Minimum Distortion, 1960). A code c of b bits stands for (c - (2^b - 1) / 2) * step.
16-bit channels are IEEE halves and need no gain.

Why static scales: the decoder never multiplies per channel. Scales and steps fold into the query once per decode
step (keys) or into the output once (values), and the gain multiplies one score or one probability.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvcompress.codec.spec import STEP, Band, SideSpec

_GAIN_CANDIDATES = tuple(2.0 ** (i / 3) for i in range(-3, 7))
_SMALLEST_GAIN, _LARGEST_GAIN = 2.0**-14, 65504.0
_HALF_MAX = 65504.0


def encode(latent_THR: Tensor, weight_HR: Tensor, side: SideSpec) -> tuple[Tensor | None, Tensor]:
    """Encode normalized latents (already divided by their static scale).

    The gain is chosen per token and head to minimise the weighted squared error *including clipping* over a small grid
    around the root mean square, then refined in closed form: a token with one extreme channel (an attention sink)
    clips under the root mean square.

    Args:
        latent_THR: float32 `[tokens, heads, rank]`.
        weight_HR: importance of each channel's squared error (its calibrated variance) `[heads, rank]`.
        side: bands; their widths add up to rank.

    Returns:
        gain_TH in float16 (None for 16-bit channels) and codes_THB in uint8.
    """
    assert latent_THR.shape[-1] == side.rank, (latent_THR.shape, side)
    latent_THR = torch.nan_to_num(latent_THR.float(), nan=0.0, posinf=_HALF_MAX, neginf=-_HALF_MAX)
    if not side.has_gain:
        halves_THR = latent_THR.clamp(-_HALF_MAX, _HALF_MAX).half().contiguous()
        return None, halves_THR.view(torch.uint8)
    gain_TH = _best_gain(latent_THR, weight_HR, side)
    code_THR = _quantize(latent_THR / gain_TH[..., None].float(), side)
    packed = [_pack(code_THR[..., start:stop], band.bits) for band, start, stop in band_slices(side)]
    return gain_TH, torch.cat(packed, dim=-1)


def decode(gain_TH: Tensor | None, codes_THB: Tensor, side: SideSpec) -> Tensor:
    """Inverse of `encode` up to rounding: float32 normalized latents `[tokens, heads, rank]`."""
    if not side.has_gain:
        return codes_THB.contiguous().view(torch.float16).float()
    assert gain_TH is not None
    parts, offset = [], 0
    for band in side.bands:
        size = band.bits * band.width // 8
        parts.append(_value(_unpack(codes_THB[..., offset : offset + size], band.bits), band.bits))
        offset += size
    return torch.cat(parts, dim=-1) * gain_TH[..., None].float()


def band_slices(side: SideSpec) -> Iterator[tuple[Band, int, int]]:
    """Each band with the channels it covers, as (band, start, stop)."""
    start = 0
    for band in side.bands:
        yield band, start, start + band.width
        start += band.width


def _best_gain(latent_THR: Tensor, weight_HR: Tensor, side: SideSpec) -> Tensor:
    rms_TH1 = latent_THR.square().mean(-1, keepdim=True).sqrt().clamp_min(_SMALLEST_GAIN)
    best_error = torch.full_like(rms_TH1, torch.inf)
    best_gain = rms_TH1.clone()
    for factor in _GAIN_CANDIDATES:
        candidate = rms_TH1 * factor
        value_THR = _values(_quantize(latent_THR / candidate, side), side)
        energy = (weight_HR * value_THR.square()).sum(-1, keepdim=True)
        # Codes fixed, the error is quadratic in the gain: its minimum is one division away.
        refined = (weight_HR * value_THR * latent_THR).sum(-1, keepdim=True) / energy
        refined = refined.clamp(_SMALLEST_GAIN, _LARGEST_GAIN).half().float()
        error = (weight_HR * (latent_THR - refined * value_THR).square()).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_gain = torch.where(better, refined, best_gain)
    return best_gain.squeeze(-1).clamp(_SMALLEST_GAIN, _LARGEST_GAIN).half()


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


def _pack(code_THW: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    codes = code_THW.to(torch.uint8).unflatten(-1, (-1, per_byte))
    shifts = torch.arange(per_byte, device=codes.device, dtype=torch.uint8) * bits
    # The codes of one byte occupy different bits, so their sum is their union.
    packed: Tensor = (codes << shifts).sum(-1, dtype=torch.uint8)
    return packed


def _unpack(bytes_THB: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(8 // bits, device=bytes_THB.device, dtype=torch.uint8) * bits
    codes: Tensor = (bytes_THB[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2)
