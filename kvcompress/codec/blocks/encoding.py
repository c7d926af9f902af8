"""The block encoding of GEAR: quantized + low rank + sparse (Kang et al., 2024, arXiv 2403.05527).

A block of latents X is stored as X ~ D + A B^T + S. D is a uniform quantizer with the least and the largest value of
each group as its ends; the entries furthest from their group's middle are left out when the ends are chosen. A B^T is
the best rank-r approximation, by power iteration, of what D leaves over the other entries. S holds, at those entries,
what D + A B^T still misses, so they come back exactly (to half precision).

Everything is batched over blocks and heads, and no block sees another.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvcompress.codec.blocks.spec import BlockSide
from kvcompress.codec.codes.registry import CODES

_HALF_MAX = 65504.0


def encode(unit_NHSR: Tensor, scale_HR: Tensor, side: BlockSide) -> Tensor:
    """Normalized latents (already divided by their static scale) to records.

    Args:
        unit_NHSR: float32 `[blocks, heads, tokens of a block, rank]`.
        scale_HR: static scale of each channel: the unit in which an error counts.

    Returns:
        uint8 `[blocks, heads, side.nbytes]`.
    """
    unit_NHSR = torch.nan_to_num(unit_NHSR.float(), nan=0.0).clamp(-_HALF_MAX, _HALF_MAX)
    scale_H1R = scale_HR[:, None, :]
    place_NHK = _furthest(unit_NHSR, scale_H1R, side)
    outlier_NHSR = torch.zeros_like(unit_NHSR, dtype=torch.bool)
    outlier_NHSR.flatten(2).scatter_(-1, place_NHK, True)
    code_NHSR, step, zero = _quantize(unit_NHSR, outlier_NHSR, side)
    rest_NHSR = unit_NHSR - _dequantize(code_NHSR, step, zero, side)
    error_NHSR = (rest_NHSR * scale_H1R).masked_fill(outlier_NHSR, 0.0)
    tokens_NHSL, channels_NHRL = _low_rank(error_NHSR, side.low_rank, side.iterations)
    tokens_NHSL, channels_NHRL = _half(tokens_NHSL), _half(channels_NHRL / scale_HR[..., None])
    rest_NHSR = rest_NHSR - tokens_NHSL.float() @ channels_NHRL.float().mT
    missing_NHK = _half(rest_NHSR.flatten(2).gather(-1, place_NHK))
    # A place is an unsigned 16-bit number; torch casts to int16 by keeping the low 16 bits.
    parts = (CODES[side.bits].pack(code_NHSR), step, zero, tokens_NHSL, channels_NHRL, missing_NHK, place_NHK.short())
    return torch.cat([part.contiguous().view(torch.uint8).flatten(2) for part in parts], dim=-1)


def decode(records_NHB: Tensor, side: BlockSide) -> Tensor:
    """Inverse of `encode` up to its error: float32 normalized latents `[blocks, heads, tokens of a block, rank]`."""
    sizes = side.parts()
    parts = dict(zip(sizes, records_NHB.split(list(sizes.values()), dim=-1), strict=True))
    halves = {name: part.contiguous().view(torch.float16) for name, part in parts.items() if name != "codes"}
    code_NHSR = CODES[side.bits].unpack(parts["codes"].unflatten(-1, (side.block, -1))).float()
    step, zero = (halves[name].unflatten(-1, (side.rows, -1)) for name in ("scale", "zero"))
    unit_NHSR = _dequantize(code_NHSR, step, zero, side)
    if side.low_rank:
        tokens_NHSL, channels_NHRL = (
            halves[name].unflatten(-1, (-1, side.low_rank)).float() for name in ("tokens", "channels")
        )
        unit_NHSR = unit_NHSR + tokens_NHSL @ channels_NHRL.mT
    if side.outliers:
        place_NHK = halves["outlier_places"].view(torch.int16).long() & 0xFFFF
        # A damaged page may name a place that is not there; it must not stop the process.
        place_NHK = place_NHK.clamp(max=side.block * side.rank - 1)
        unit_NHSR.flatten(2).scatter_add_(-1, place_NHK, halves["outlier_values"].float())
    return unit_NHSR


def _furthest(unit_NHSR: Tensor, scale_H1R: Tensor, side: BlockSide) -> Tensor:
    """Places of the entries whose removal helps most, ascending.

    An entry counts by its distance from the median of its group, in units of the error that the group's range causes:
    the root mean square of its members' static scales.
    """
    rows = _turned(unit_NHSR, side)
    weights = _turned(scale_H1R.square().expand(unit_NHSR.shape), side)
    distance = torch.cat(
        [
            (group - group.median(-1, keepdim=True).values).abs() * weight.mean(-1, keepdim=True).sqrt()
            for group, weight in zip(_groups(rows, side), _groups(weights, side), strict=True)
        ],
        dim=-1,
    )
    return _largest(_turned(distance, side).flatten(2), side.outliers)


def _largest(numbers_NHE: Tensor, count: int) -> Tensor:
    """Places of the `count` largest entries, ascending; of equal ones the first, because ties must fall the same way
    everywhere. No sort of all entries: it was two fifths of the work of encoding a block."""
    if not count:
        return torch.empty(*numbers_NHE.shape[:-1], 0, dtype=torch.int64, device=numbers_NHE.device)
    least_NH1 = numbers_NHE.topk(count, dim=-1).values[..., -1:]
    above, equal = numbers_NHE > least_NH1, numbers_NHE == least_NH1
    room_NH1 = count - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room_NH1))
    # As many as are known here: counting them would wait for a GPU.
    found = torch.nonzero_static(chosen, size=count * numbers_NHE.shape[:-1].numel())
    return found[:, -1].view(*numbers_NHE.shape[:-1], count)


def _quantize(unit_NHSR: Tensor, outlier_NHSR: Tensor, side: BlockSide) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[blocks, heads, tokens, rank]`, and scale and zero of every group `[blocks, heads, rows, groups]`."""
    top = 2**side.bits - 1
    codes, steps, zeros = [], [], []
    rows = (_groups(_turned(tensor, side), side) for tensor in (unit_NHSR, outlier_NHSR))
    for group, outlier in zip(*rows, strict=True):
        # A group with nothing left takes its ends from all its entries: what S must hold is then small.
        left_out = outlier & ~outlier.all(-1, keepdim=True)
        zero = _half(group.masked_fill(left_out, torch.inf).amin(-1, keepdim=True))
        largest = group.masked_fill(left_out, -torch.inf).amax(-1, keepdim=True)
        step = _half((largest - zero.float()).clamp_min(0.0) / top)
        divisor = step.float().masked_fill(step == 0, torch.inf)
        codes.append(((group - zero.float()) / divisor).round().clamp(0, top))
        steps.append(step)
        zeros.append(zero)
    return _turned(torch.cat(codes, -1), side), torch.cat(steps, -1), torch.cat(zeros, -1)


def _dequantize(code_NHSR: Tensor, step: Tensor, zero: Tensor, side: BlockSide) -> Tensor:
    groups = _groups(_turned(code_NHSR, side), side)
    values = [
        group * step[..., index : index + 1].float() + zero[..., index : index + 1].float()
        for index, group in enumerate(groups)
    ]
    return _turned(torch.cat(values, -1), side).contiguous()


def _low_rank(error_NHSR: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Factors A `[.., tokens, rank]`, orthonormal, and B `[.., channels, rank]`: A B^T is the error on A's span.

    The start is fixed, so the same block gives the same bytes; cosines of all frequencies are orthogonal to nothing
    that data has a reason to contain.
    """
    channels = error_NHSR.shape[-1]
    place = (torch.arange(channels, device=error_NHSR.device, dtype=torch.float32) + 0.5) / channels
    frequency = torch.arange(1, rank + 1, device=error_NHSR.device)
    factor = torch.cos(torch.pi * place[:, None] * frequency).expand(*error_NHSR.shape[:-2], channels, rank)
    basis = _orthonormal(error_NHSR @ factor)
    for _ in range(iterations - 1):
        basis = _orthonormal(error_NHSR @ _orthonormal(error_NHSR.mT @ basis))
    return basis, error_NHSR.mT @ basis


def _orthonormal(columns: Tensor) -> Tensor:
    """Gram-Schmidt on the last axis, each column cleaned twice; a column with nothing left becomes zero."""
    found: list[Tensor] = []
    for column in columns.unbind(-1):
        size = column.norm(dim=-1, keepdim=True)
        for _ in range(2):
            for earlier in found:
                column = column - earlier * (earlier * column).sum(-1, keepdim=True)
        rest = column.norm(dim=-1, keepdim=True)
        found.append(torch.where(rest > 1e-6 * size, column / rest.clamp_min(1e-30), 0.0))
    return torch.stack(found, -1) if found else columns


def _turned(block: Tensor, side: BlockSide) -> Tensor:
    """Groups along the last axis, or back: `[.., tokens, channels]` and, for groups along tokens, its transpose."""
    return block.mT if side.along == "tokens" else block


def _groups(rows: Tensor, side: BlockSide) -> Iterator[Tensor]:
    return iter(rows.split(side.group, dim=-1))


def _half(numbers: Tensor) -> Tensor:
    return numbers.clamp(-_HALF_MAX, _HALF_MAX).half()
