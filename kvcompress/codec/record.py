"""What is stored of a token, head and side: gain, codes, and the channels that are stored exactly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress.codec.bands import SideSpec


class Record(NamedTuple):
    """Tokens of one side."""

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
    def from_parts(cls, parts: Iterable[Tensor | None]) -> Record:
        """Inverse of `to_parts`."""
        gain, outliers, channels, codes = parts
        assert codes is not None
        gain_TH = None if gain is None else _halves_of(gain).squeeze(-1)
        return cls(gain_TH, codes, None if outliers is None else _halves_of(outliers), channels)

    def heads(self, start: int, stop: int) -> Record:
        """Heads [start, stop)."""
        parts = [None if part is None else part[:, start:stop] for part in self]
        return Record(parts[0], self.codes_THB[:, start:stop], *parts[2:])

    @classmethod
    def concatenate(cls, heads: Sequence[Record]) -> Record:
        """The heads of several, one after the other."""
        parts = [None if part[0] is None else torch.cat(part, dim=1) for part in zip(*heads, strict=True)]
        codes_THB = torch.cat([head.codes_THB for head in heads], dim=1)
        return cls(parts[0], codes_THB, *parts[2:])

    def to_bytes(self) -> Tensor:
        """All parts of a token and head in one row of bytes `[tokens, heads, bytes]`."""
        return torch.cat([part for part in self.to_parts() if part is not None], dim=-1)

    @classmethod
    def from_bytes(cls, bytes_THX: Tensor, side: SideSpec) -> Record:
        """Inverse of `to_bytes`."""
        parts = bytes_THX.split(side.part_bytes, dim=-1)
        return cls.from_parts(part if part.shape[-1] else None for part in parts)


def _bytes_of(halves: Tensor | None) -> Tensor | None:
    return None if halves is None else halves.contiguous().view(torch.uint8)


def _halves_of(stored: Tensor) -> Tensor:
    # A copy: a slice of a record may be contiguous and still begin at an odd byte.
    return stored.clone(memory_format=torch.contiguous_format).view(torch.float16)
