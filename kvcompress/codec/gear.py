"""The codec of one layer whose cache has the form `blocks`, and attention on it: the specification.

Tokens are compressed a block at a time. What a query sees depends on its position alone: the query of token t attends
block b in compressed form if the block is complete by then, (b + 1) * block <= t + 1, and every later token exactly,
without the codec's latents. So a result does not depend on how a prompt is cut, on prefix hits or on preemption.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.codec import gear_blocks
from kvcompress.codec.forms import ReadTensor
from kvcompress.codec.gear_spec import BlockSide, BlockSpec
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


class BlockCodec(Sides[BlockSideCodec]):
    """Keys and values of one attention layer."""

    @property
    def spec(self) -> BlockSpec:
        heads, head_dim = self.k.mean_HD.shape
        return BlockSpec(heads, head_dim, self.k.spec, self.v.spec)

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

    def round_trip(self, keys_THD: Tensor, values_THD: Tensor) -> tuple[Tensor, Tensor]:
        """One sequence's keys and values as a query after its end reads them: the open block is exact."""
        block = self.spec.block
        whole = keys_THD.shape[0] // block * block
        read = self.reconstruct(self.seal(keys_THD[:whole], values_THD[:whole]))
        keys, values = (
            torch.cat([x_NHSD.transpose(1, 2).flatten(0, 1), exact_THD[whole:].float()])
            for x_NHSD, exact_THD in zip(read, (keys_THD, values_THD), strict=True)
        )
        return keys, values

    @classmethod
    def from_tensors(cls, spec: BlockSpec, read: ReadTensor) -> BlockCodec:
        return cls(BlockSideCodec.read("k", spec.k, spec, read), BlockSideCodec.read("v", spec.v, spec, read))

    def _split(self, records_NHB: Tensor) -> list[tuple[BlockSideCodec, Tensor]]:
        k_bytes, v_bytes = (side.spec.nbytes for side in (self.k, self.v))
        return [(self.k, records_NHB[..., :k_bytes]), (self.v, records_NHB[..., k_bytes : k_bytes + v_bytes])]


def visible_rows(position_Q: Tensor, sealed: int, exact_start: int, exact: int, block: int) -> tuple[Tensor, Tensor]:
    """What each query sees: of the first `sealed` tokens in compressed form, and of `exact` tokens as they are.

    Args:
        position_Q: positions of the queries.
        exact_start: position of the first exact token.

    Returns:
        bool `[queries, sealed]` and `[queries, exact]`.
    """
    complete_Q1 = ((position_Q + 1) // block * block)[:, None]
    device = position_Q.device
    sealed_T, exact_T = (
        torch.arange(sealed, device=device),
        torch.arange(exact_start, exact_start + exact, device=device),
    )
    return sealed_T < complete_Q1, (exact_T >= complete_Q1) & (exact_T <= position_Q[:, None])


def attend(
    query_QHGD: Tensor,
    sealed_THR: tuple[Tensor, Tensor],
    exact_THD: tuple[Tensor, Tensor],
    exact_start: int,
    codec: BlockCodec,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Causal attention of the newest Q tokens of a sequence.

    Scores of compressed keys by absorption, q . k = q . mean + (q @ decode^T) . latent; unlike in a cache of one form,
    the constant q . mean counts, because exact keys stand in the same softmax.

    Args:
        query_QHGD: queries `[query tokens, KV heads, query heads per KV head, head_dim]`, after RoPE.
        sealed_THR: normalized latents of keys and of values of every complete block, or of those the last query sees.
        exact_THD: the newest tokens' keys and values as they are, the query tokens' own included.
        exact_start: position of the first of them: no later than the start of the first query's incomplete block.
        softmax_scale: usually head_dim ** -0.5.

    Returns:
        `[query tokens, KV heads, query heads per KV head, head_dim]` in the latents' dtype, and the log of the sum of
        exponentials of each row `[query tokens, KV heads, query heads per KV head]`.
    """
    (k_latent_THR, v_latent_THR), (keys_THD, values_THD) = sealed_THR, exact_THD
    dtype, queries, end = k_latent_THR.dtype, query_QHGD.shape[0], exact_start + keys_THD.shape[0]
    position_Q = torch.arange(end - queries, end, device=query_QHGD.device)
    sees = visible_rows(position_Q, k_latent_THR.shape[0], exact_start, keys_THD.shape[0], codec.spec.block)
    query_QHGD = query_QHGD.to(dtype) * softmax_scale
    absorbed = torch.einsum("qhgd,hrd->hgqr", query_QHGD, codec.k.decode_HRD.to(dtype))
    constant = torch.einsum("qhgd,hd->hgq", query_QHGD, codec.k.mean_HD.to(dtype))
    sealed_scores = torch.einsum("hgqr,thr->hgqt", absorbed, k_latent_THR) + constant[..., None]
    exact_scores = torch.einsum("qhgd,thd->hgqt", query_QHGD, keys_THD.to(dtype))
    scores = torch.cat([sealed_scores, exact_scores], -1).masked_fill(~torch.cat(sees, -1), -torch.inf)
    lse_HGQ = scores.logsumexp(-1)
    sealed_part, exact_part = scores.softmax(-1).split([k_latent_THR.shape[0], keys_THD.shape[0]], dim=-1)
    mixed = torch.einsum("hgqt,thr->hgqr", sealed_part, v_latent_THR)
    mass_QHG1 = sealed_part.sum(-1).permute(2, 0, 1)[..., None]
    output: Tensor = torch.einsum("hgqr,hrd->qhgd", mixed, codec.v.decode_HRD.to(dtype))
    output += mass_QHG1 * codec.v.mean_HD.to(dtype)[:, None, :]
    output += torch.einsum("hgqt,thd->qhgd", exact_part, values_THD.to(dtype))
    return output, lse_HGQ.permute(2, 0, 1)
