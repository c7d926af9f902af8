"""The cache form `blocks` as plain data: tokens are compressed a block at a time. No torch.

A record holds one block of one layer and one KV head. For keys, then for values, its parts follow each other:

    codes           uint8 [block, rank * bits / 8]     channel c of b bits in byte c*b//8 at bit c*b%8
    scale, zero     fp16  [groups] each                a code stands for code * scale + zero
    tokens          fp16  [block, low_rank]            the two factors of the low-rank residual
    channels        fp16  [rank, low_rank]
    outlier values  fp16  [outliers]                   what is still missing at the outliers
    outlier places  int16 [outliers]                   token * rank + channel, read as unsigned, ascending

and zeros at the end make it a multiple of `block` bytes, so that bytes per token are a whole number. Every part starts
on a multiple of 16 bytes. Groups are numbered along the axis they run across first: for keys (groups along tokens)
all groups of channel 0, then channel 1; for values (groups along channels) all groups of token 0, then token 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self

from kvcompress.codec.bands import CHANNEL_GROUP, Band, summary
from kvcompress.codec.codes.registry import quantized

_PART_ALIGNMENT = 16
_HALF_BYTES = 2
_MAX_ENTRIES = 1 << 16
"""An outlier's place has 16 bits."""

OUTLIER_GROUP = _PART_ALIGNMENT // _HALF_BYTES
"""Outliers are counted in whole groups of this size, so that every part keeps its alignment."""

Axis = Literal["tokens", "channels"]


@dataclass(frozen=True)
class BlockSide:
    """Keys or values of one layer: how one head's block `[block, rank]` is stored."""

    block: int
    """Tokens of a block."""
    rank: int
    """Channels kept."""
    bits: int
    along: Axis
    """Which way the values of one quantization group run."""
    group: int
    """Values that share a scale and a zero; the last group of a row may be shorter."""
    low_rank: int
    """Rank of the residual's factors."""
    iterations: int
    """Steps of the power iteration that finds them."""
    outliers: int
    """Entries of a block that are kept exactly."""

    def __post_init__(self) -> None:
        if self.bits not in quantized():
            raise ValueError(f"found {self.bits} bits in a block; expected one of {quantized()}")
        if self.rank <= 0 or self.rank % CHANNEL_GROUP:
            raise ValueError(f"found {self.rank} channels; expected a positive multiple of {CHANNEL_GROUP}")
        if self.along not in ("tokens", "channels"):
            raise ValueError(f"found groups along {self.along!r}; expected tokens or channels")
        if self.block <= 0 or self.block % _PART_ALIGNMENT:
            raise ValueError(f"found blocks of {self.block} tokens; expected a positive multiple of {_PART_ALIGNMENT}")
        entries = self.block * self.rank
        if entries > _MAX_ENTRIES:
            raise ValueError(f"found blocks of {self.block} x {self.rank}; expected at most {_MAX_ENTRIES} entries")
        if self.group < 1 or self.iterations < 1:
            raise ValueError(f"found groups of {self.group} and {self.iterations} iterations; expected at least 1")
        if not 0 <= self.low_rank <= min(self.block, self.rank):
            raise ValueError(f"found a residual of rank {self.low_rank} in blocks of {self.block} x {self.rank}")
        if not 0 <= self.outliers <= entries or self.outliers % OUTLIER_GROUP:
            raise ValueError(
                f"found {self.outliers} outliers in blocks of {entries} entries; "
                f"expected at most as many, in multiples of {OUTLIER_GROUP}"
            )
        assert all(size % _PART_ALIGNMENT == 0 for size in self.parts().values()), self

    @property
    def rows(self) -> int:
        """Rows of groups: channels where groups run along tokens, tokens where they run along channels."""
        return self.rank if self.along == "tokens" else self.block

    def parts(self) -> dict[str, int]:
        """Bytes of each part of a record, in order."""
        groups = self.rows * -(-(self.block * self.rank // self.rows) // self.group)
        return {
            "codes": self.block * self.rank * self.bits // 8,
            "scale": _HALF_BYTES * groups,
            "zero": _HALF_BYTES * groups,
            "tokens": _HALF_BYTES * self.block * self.low_rank,
            "channels": _HALF_BYTES * self.rank * self.low_rank,
            "outlier_values": _HALF_BYTES * self.outliers,
            "outlier_places": _HALF_BYTES * self.outliers,
        }

    @property
    def nbytes(self) -> int:
        """Bytes of a block of this side and one head, without padding."""
        return sum(self.parts().values())


@dataclass(frozen=True)
class BlocksSpec:
    """Form `blocks`: complete blocks of tokens in compressed form, the newest, incomplete one as it is."""

    form: ClassVar[str] = "blocks"
    group: ClassVar[None] = None

    num_kv_heads: int
    head_dim: int
    k: BlockSide
    v: BlockSide

    def __post_init__(self) -> None:
        if self.k.block != self.v.block:
            raise ValueError(f"keys come in blocks of {self.k.block} tokens and values in {self.v.block}")
        for name, side in (("k", self.k), ("v", self.v)):
            if side.rank > self.head_dim:
                raise ValueError(f"{name} keeps {side.rank} channels, more than head_dim {self.head_dim}")

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.k.block

    @property
    def record_bytes(self) -> int:
        """Bytes of one block of one head, padding included."""
        used = self.k.nbytes + self.v.nbytes
        return -(-used // self.block) * self.block

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token of a complete block, all heads, keys and values, everything included."""
        return self.num_kv_heads * self.record_bytes // self.block

    def open_block_bytes(self, element_bytes: int, tokens: int | None = None) -> int:
        """Bytes that each request takes besides, for its newest tokens in the model's own dtype.

        Args:
            tokens: how many there is room for; the block if not given.
        """
        return 2 * self.num_kv_heads * self.head_dim * element_bytes * (tokens or self.block)

    def summary(self) -> dict[str, Any]:
        return {"k": self._side_summary(self.k), "v": self._side_summary(self.v), "block": self.block}

    def _side_summary(self, side: BlockSide) -> dict[str, Any]:
        return {
            **summary([Band(side.bits, side.rank)], self.head_dim),
            "stored_bits": round(8 * side.nbytes / (self.block * self.head_dim), 4),
            "group": side.group,
            "low_rank": side.low_rank,
            "outliers": side.outliers,
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        sides = (
            BlockSide(**{field.name: data[name][field.name] for field in fields(BlockSide)}) for name in ("k", "v")
        )
        return cls(int(data["num_kv_heads"]), int(data["head_dim"]), *sides)
