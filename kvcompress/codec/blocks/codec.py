"""The codec of one layer whose cache has the form `blocks`, and attention on it: the specification.

Tokens are compressed a block at a time. What a query sees depends on its position alone: the query of token t attends
block b in compressed form if the block is complete by then, (b + 1) * block <= t + 1, and every later token exactly,
without the codec's latents. So a result does not depend on how a prompt is cut, on prefix hits or on preemption.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.codec.blocks import encoding as gear_blocks
from kvcompress.codec.blocks.spec import BlockSide, BlocksSpec
from kvcompress.codec.contract import ReadTensor
from kvcompress.codec.side import Side, Sides


class BlockSideCodec(Side[BlockSide]):
    """Keys or values of one layer, a block of tokens at a time."""

    def encode(self, x_NHSD: Tensor) -> Tensor:
        """Complete blocks `[blocks, heads, block, head_dim]` to bytes `[blocks, heads, bytes]`."""
        unit_NHSR = (x_NHSD.float() - self.mean_HD[:, None, :]) @ self.encode_HDR
        return gear_blocks.encode(unit_NHSR, self.scale_HR, self.spec)

    def decode(self, records_NHB: Tensor) -> Tensor:
        """Bytes to normalized latents `[blocks, heads, block, rank]`, float32."""
        return gear_blocks.decode(records_NHB, self.spec)

    def reconstruct(self, records_NHB: Tensor) -> Tensor:
        """Bytes back to keys or values `[blocks, heads, block, head_dim]`, float32."""
        return self.decode(records_NHB) @ self.decode_HRD + self.mean_HD[:, None, :]


class BlocksCodec(Sides[BlockSideCodec]):
    """Keys and values of one attention layer."""

    @property
    def spec(self) -> BlocksSpec:
        heads, head_dim = self.k.mean_HD.shape
        return BlocksSpec(heads, head_dim, self.k.spec, self.v.spec)

    def seal(self, keys_THD: Tensor, values_THD: Tensor) -> Tensor:
        """Whole blocks of one sequence's tokens to records `uint8 [blocks, heads, record_bytes]`."""
        spec = self.spec
        assert keys_THD.shape[0] % spec.block == 0
        parts = [
            side.encode(x_THD.unflatten(0, (-1, spec.block)).transpose(1, 2))
            for side, x_THD in ((self.k, keys_THD), (self.v, values_THD))
        ]
        records_NHB = torch.cat(parts, dim=-1)
        return torch.nn.functional.pad(records_NHB, (0, spec.record_bytes - records_NHB.shape[-1]))

    def open(self, records_NHB: Tensor) -> tuple[Tensor, Tensor]:
        """Records of one sequence, in order, to normalized latents (k_THR, v_THR)."""
        k_latent, v_latent = (side.decode(part) for side, part in self._split(records_NHB))
        return k_latent.transpose(1, 2).flatten(0, 1), v_latent.transpose(1, 2).flatten(0, 1)

    def reconstruct(self, records_NHB: Tensor) -> tuple[Tensor, Tensor]:
        """Records `[blocks, heads, record_bytes]` to keys and values `[blocks, heads, block, head_dim]`, float32."""
        keys, values = (side.reconstruct(part) for side, part in self._split(records_NHB))
        return keys, values

    @staticmethod
    def round_trip(
        codecs: Sequence[BlocksCodec], keys_THD: Sequence[Tensor], values_THD: Sequence[Tensor], positions_T: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """As a query after the sequence's end reads them: the open block is exact."""
        return [codec._read_back(*sides) for codec, *sides in zip(codecs, keys_THD, values_THD, strict=True)]

    def _read_back(self, keys_THD: Tensor, values_THD: Tensor) -> tuple[Tensor, Tensor]:
        block = self.spec.block
        whole = keys_THD.shape[0] // block * block
        read = self.reconstruct(self.seal(keys_THD[:whole], values_THD[:whole]))
        keys, values = (
            torch.cat([x_NHSD.transpose(1, 2).flatten(0, 1), exact_THD[whole:].float()])
            for x_NHSD, exact_THD in zip(read, (keys_THD, values_THD), strict=True)
        )
        return keys, values

    def as_stored(self, side: str, query_Q1: Tensor, token_1T: Tensor, start: int) -> Tensor:
        """Those of blocks that are complete when the query's token is there."""
        block = self.spec.block
        return token_1T < (query_Q1 + 1) // block * block

    @classmethod
    def from_tensors(cls, spec: BlocksSpec, read: ReadTensor) -> BlocksCodec:
        return cls(BlockSideCodec.read("k", spec.k, spec, read), BlockSideCodec.read("v", spec.v, spec, read))

    def _split(self, records_NHB: Tensor) -> list[tuple[BlockSideCodec, Tensor]]:
        k_bytes, v_bytes = (side.spec.nbytes for side in (self.k, self.v))
        return [(self.k, records_NHB[..., :k_bytes]), (self.v, records_NHB[..., k_bytes : k_bytes + v_bytes])]
