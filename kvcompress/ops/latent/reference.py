"""Latent attention on paged memory in torch, which specifies `ops.latent`: arguments are its."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress.ops.heads.reference import SCORE_BYTES


def append(pages_NSC: Tensor, key_TC: Tensor, slots_T: Tensor) -> None:
    """Store tokens in their slots (block * tokens per block + offset); slots below 0 are padding and are skipped."""
    valid = slots_T >= 0
    if not bool(valid.all()):
        key_TC, slots_T = key_TC[valid], slots_T[valid]
    block_size = pages_NSC.shape[1]
    pages_NSC[slots_T // block_size, slots_T % block_size] = key_TC.to(pages_NSC.dtype)


def attend(
    output_THR: Tensor,
    query_THC: Tensor,
    pages_NSC: Tensor,
    block_table_RN: Tensor,
    query_starts: Sequence[int],
    seq_lens: Sequence[int],
    softmax_scale: float,
) -> None:
    """Causal attention of every request's new tokens over all of its tokens, in float32.

    Args:
        output_THR: written in place; R, the latent's channels, are the first of the cached vector's.
        query_THC: absorbed queries `[tokens, heads, channels]`.
        pages_NSC: `[blocks, tokens per block, channels]`; blocks may be strided.
        block_table_RN: blocks of each request, in order.
        query_starts: where each request's new tokens start in query and output, and where the last one's end.
        seq_lens: tokens of each request, new ones included.
    """
    rank, heads = output_THR.shape[2], query_THC.shape[1]
    for request, length in enumerate(seq_lens):
        start, stop = query_starts[request], query_starts[request + 1]
        if start == stop:
            continue
        blocks_N = block_table_RN[request, : -(-length // pages_NSC.shape[1])].long()
        keys_LC = pages_NSC[blocks_N].flatten(0, 1)[:length].float()
        step = max(1, SCORE_BYTES // (4 * heads * length))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            # Tokens after the chunk's last query are invisible to all of it.
            visible = length - (stop - last)
            queries = last - first
            query_HQC = query_THC[first:last].float().transpose(0, 1) * softmax_scale
            scores_HQL = query_HQC @ keys_LC[:visible].mT
            if queries > 1:
                mask_QL = torch.ones(queries, visible, dtype=torch.bool, device=scores_HQL.device)
                scores_HQL = scores_HQL.masked_fill(~mask_QL.tril(visible - queries), -torch.inf)
            mixed_HQR = scores_HQL.softmax(-1) @ keys_LC[:visible, :rank]
            output_THR[first:last] = mixed_HQR.transpose(0, 1).to(output_THR.dtype)
