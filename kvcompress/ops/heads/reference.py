"""The fallback: the torch code in `codec` that specifies the kernels, run on a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from kvcompress.codec.heads.layout import PageLayout
from kvcompress.ops.heads.plan import HeadsPlan, SidePlan

if TYPE_CHECKING:
    from kvcompress.codec.bands import SideSpec
    from kvcompress.codec.heads.codec import HeadsCodec
    from kvcompress.codec.heads.spec import HeadsSpec
    from kvcompress.codec.scalar import Encoded

SCORE_BYTES = 64 * 2**20
"""Bound on the scores (queries x tokens) held at a time: a long prefill is attended in chunks of queries."""


@dataclass(frozen=True)
class _Side:
    """A side's plan with the directions `codec.pages` and `codec.attention` ask a codec for."""

    plan: SidePlan

    @property
    def spec(self) -> SideSpec:
        return self.plan.spec

    @property
    def mean_HD(self) -> Tensor:
        return self.plan.mean_HD

    @property
    def decode_HRD(self) -> Tensor:
        return self.plan.decode_HRD

    def encode(self, x_THD: Tensor) -> Encoded:
        from kvcompress.codec import scalar

        latent_THR = torch.einsum("thd,hdr->thr", x_THD.float() - self.plan.mean_HD, self.plan.encode_HDR)
        return scalar.encode(latent_THR, self.plan.weight_HR, self.plan.spec)

    def decode(self, encoded: Encoded) -> Tensor:
        from kvcompress.codec import scalar

        return scalar.decode(encoded, self.plan.spec)


@dataclass(frozen=True)
class _Layer:
    spec: HeadsSpec
    k: _Side
    v: _Side


def _codec(plan: HeadsPlan) -> HeadsCodec:
    return cast("HeadsCodec", _Layer(plan.spec, _Side(plan.k), _Side(plan.v)))


def append(
    pages_NHX: Tensor, layout: PageLayout, plan: HeadsPlan, keys_THD: Tensor, values_THD: Tensor, slots_T: Tensor
) -> None:
    """`codec.pages.append` on a plan."""
    from kvcompress.codec.heads import pages

    pages.append(pages_NHX, layout, _codec(plan), keys_THD, values_THD, slots_T)


def gather_decode(
    pages_NHX: Tensor, layout: PageLayout, plan: HeadsPlan, block_table_N: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """`codec.pages.read` on a plan."""
    from kvcompress.codec.heads import pages

    blocks_N = block_table_N[: -(-length // layout.block_size)].long()
    return pages.read(pages_NHX, layout, _codec(plan), blocks_N, length)


def decode_attention(
    output_THD: Tensor,
    query_THD: Tensor,
    pages_NHX: Tensor,
    layout: PageLayout,
    plan: HeadsPlan,
    block_table_RN: Tensor,
    query_starts: Sequence[int],
    seq_lens: Sequence[int],
    softmax_scale: float,
    lse_TH: Tensor | None = None,
) -> None:
    """`codec.attention.attend` for every request; arguments as in `ops.attention.decode_attention`."""
    from kvcompress.codec.heads import attention
    from kvcompress.ops.heads import gather

    codec = _codec(plan)
    for request, length in enumerate(seq_lens):
        start, stop = query_starts[request], query_starts[request + 1]
        if start == stop:
            continue
        k_latent_THR, v_latent_THR = gather.gather_decode(pages_NHX, layout, plan, block_table_RN[request], length)
        query_QHGD = query_THD[start:stop].view(stop - start, layout.num_kv_heads, -1, query_THD.shape[2])
        step = max(1, SCORE_BYTES // (4 * query_THD.shape[1] * length))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            # Tokens after the chunk's last query are invisible to all of it.
            visible = length - (stop - last)
            chunk_QHGD = query_QHGD[first - start : last - start]
            mixed_QHGD = attention.attend(
                chunk_QHGD, k_latent_THR[:visible], v_latent_THR[:visible], codec, softmax_scale
            )
            output_THD[first:last] = mixed_QHGD.flatten(1, 2).to(output_THD.dtype)
            if lse_TH is not None:
                lse_TH[first:last] = _lse(chunk_QHGD, k_latent_THR[:visible], plan, softmax_scale)


def _lse(query_QHGD: Tensor, k_latent_THR: Tensor, plan: HeadsPlan, softmax_scale: float) -> Tensor:
    queries, tokens = query_QHGD.shape[0], k_latent_THR.shape[0]
    scaled_QHGD = query_QHGD.float() * softmax_scale
    absorbed = torch.einsum("qhgd,hrd->hgqr", scaled_QHGD, plan.k.decode_HRD)
    scores = torch.einsum("hgqr,thr->hgqt", absorbed, k_latent_THR)
    visible = torch.ones(queries, tokens, dtype=torch.bool, device=scores.device).tril(tokens - queries)
    sums_HGQ = scores.masked_fill(~visible, -torch.inf).logsumexp(-1)
    constant_QHG = torch.einsum("qhgd,hd->qhg", scaled_QHGD, plan.k.mean_HD)
    return (sums_HGQ.permute(2, 0, 1) + constant_QHG).flatten(1)
