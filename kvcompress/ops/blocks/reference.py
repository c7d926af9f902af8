"""Attention on complete blocks and a ring of newer tokens in torch: what the kernels do, and where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompress.ops.heads import reference

if TYPE_CHECKING:
    from kvcompress.codec.blocks.codec import BlocksCodec


def newest(
    rings_NHXPD: Tensor, ring_1: Tensor, key_THD: Tensor, value_THD: Tensor, length: int, block: int
) -> tuple[tuple[Tensor, Tensor], int]:
    """A request's keys and values from the start of the block that was open before this step, and that start.

    Args:
        ring_1: the request's ring, a number that is not read here.
        key_THD, value_THD: the step's own.
        length: of the request, the step's tokens included.
    """
    before = length - key_THD.shape[0]
    start = before // block * block
    place = torch.arange(start, before, device=key_THD.device) % rings_NHXPD.shape[3]
    old_keys, old_values = rings_NHXPD[ring_1.long(), :, :, place].unbind(2)
    return (torch.cat([old_keys, key_THD]), torch.cat([old_values, value_THD])), start


def attend(
    output_THD: Tensor,
    query_THD: Tensor,
    keys_THD: Tensor,
    values_THD: Tensor,
    pages_NHMB: Tensor,
    rings_NHXPD: Tensor,
    ring_R: Sequence[int],
    codec: BlocksCodec,
    block_table_RN: Tensor,
    query_starts: Sequence[int],
    seq_lens: Sequence[int],
    softmax_scale: float,
    lse_TH: Tensor | None = None,
) -> None:
    """`codec.blocks.attention.attend` for every request, a bounded number of scores at a time; arguments as there."""
    from kvcompress.codec.blocks import attention

    spec, per_page = codec.spec, pages_NHMB.shape[2]
    for request, length in enumerate(seq_lens):
        start, stop = query_starts[request], query_starts[request + 1]
        if start == stop:
            continue
        blocks = torch.arange(length // spec.block, device=pages_NHMB.device)
        page = block_table_RN[request].long()[blocks // per_page]
        latents_THR = codec.open(pages_NHMB[page, :, blocks % per_page])
        ring_1 = torch.tensor([ring_R[request]], device=pages_NHMB.device)
        tokens = (keys_THD[start:stop], values_THD[start:stop])
        exact_THD, exact_start = newest(rings_NHXPD, ring_1, *tokens, length, spec.block)
        rows = latents_THR[0].shape[0] + exact_THD[0].shape[0]
        step = max(1, reference.SCORE_BYTES // (4 * query_THD.shape[1] * rows))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            # Tokens after the chunk's last query are invisible to all of it.
            end = length - (stop - last)
            k_latent_THR, v_latent_THR = (latent[: end // spec.block * spec.block] for latent in latents_THR)
            exact_keys_THD, exact_values_THD = (side[: end - exact_start] for side in exact_THD)
            mixed_QHGD, lse_QHG = attention.attend(
                query_THD[first:last].unflatten(1, (spec.num_kv_heads, -1)),
                (k_latent_THR, v_latent_THR),
                (exact_keys_THD, exact_values_THD),
                exact_start,
                codec,
                softmax_scale,
            )
            output_THD[first:last] = mixed_QHGD.flatten(1, 2).to(output_THD.dtype)
            if lse_TH is not None:
                lse_TH[first:last] = lse_QHG.flatten(1)
