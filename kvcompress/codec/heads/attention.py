"""Reference attention on a compressed cache, in plain torch: the specification of every kernel.

Keys' side, absorbed: q . k = q . mean + (q @ decode_k^T) . latent, and q . mean is the same for every key of a row, so
the softmax cancels it. Values' side: sum_t p_t v_t = (sum_t p_t latent_t) @ decode_v + mean, because sum p = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.codec.heads.codec import HeadsCodec


def attend(
    query_QHGD: Tensor, k_latent_THR: Tensor, v_latent_THR: Tensor, codec: HeadsCodec, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention of the last Q of T tokens over all T.

    Args:
        query_QHGD: queries `[query tokens, KV heads, query heads per KV head, head_dim]`, after RoPE.
        k_latent_THR, v_latent_THR: normalized latents of every token, the query tokens' own included.
        softmax_scale: usually head_dim ** -0.5.

    Returns:
        float32 `[query tokens, KV heads, query heads per KV head, head_dim]`, and the log of the sum of exponentials of
        each row `[query tokens, KV heads, query heads per KV head]`.
    """
    queries, tokens = query_QHGD.shape[0], k_latent_THR.shape[0]
    assert queries <= tokens
    scaled_QHGD = query_QHGD.float() * softmax_scale
    absorbed = torch.einsum("qhgd,hrd->hgqr", scaled_QHGD, codec.k.decode_HRD)
    scores = torch.einsum("hgqr,thr->hgqt", absorbed, k_latent_THR)
    if queries > 1:
        visible = torch.ones(queries, tokens, dtype=torch.bool, device=scores.device).tril(tokens - queries)
        scores = scores.masked_fill(~visible, -torch.inf)
    mixed = torch.einsum("hgqt,thr->hgqr", scores.softmax(-1), v_latent_THR)
    output_QHGD = torch.einsum("hgqr,hrd->qhgd", mixed, codec.v.decode_HRD) + codec.v.mean_HD[:, None, :]
    constant_QHG = torch.einsum("qhgd,hd->qhg", scaled_QHGD, codec.k.mean_HD)
    return output_QHGD, scores.logsumexp(-1).permute(2, 0, 1) + constant_QHG
