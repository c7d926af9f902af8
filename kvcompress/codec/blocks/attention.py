"""Attention on complete blocks and exact newer tokens, in plain torch: the specification of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.codec.blocks.codec import BlocksCodec


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
    codec: BlocksCodec,
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
