"""What independent small errors of scores and values do to a layer's output, to first order.

A query's output is o = sum_t p_t v_t, p = softmax(s), and the layer's is out = sum_h W_h o_h. Errors e_t of scores move
o by sum_t p_t e_t (v_t - o), errors f_t of values by sum_t p_t f_t. If errors of different tokens and heads are
independent, their squares add up:

    E|dout|^2 = E[e^2] sum_t p_t^2 |W (v_t - o)|^2          keys
    E|dout|^2 = E|W f|^2 sum_t p_t^2                        values

Both are divided by |h + out|^2, the residual stream after attention: every block that follows normalises it first, so
an error counts relative to it. (Relative to the attention output alone, an error says how good the cache is, not what
it does to the model: a layer whose output is small beside the stream may lose much of it, one that writes most of the
stream may not.) The median over tokens stands for the stream, because in large models a few tokens have thousands of
times the energy of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUERIES = 16
"""Queries per sample whose attention weights are looked at: means need no more."""

_WEIGHT_ROWS = 256
"""Rows of the output projection cast at a time."""


class SensitivityAccumulator:
    """Collects the sums of the equations above over some queries of every sample."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.residuals: list[Tensor] = []
        self.square_sum_H = torch.zeros(())
        self.spread_HDD = torch.zeros(())

    def add(
        self, query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, softmax_scale: float, hidden_BTC: Tensor | None
    ) -> None:
        """One batch of post-RoPE queries, keys and values; `hidden_BTC` is the residual stream before attention."""
        tokens, group = query_BHTD.shape[2], query_BHTD.shape[1] // key_BHTD.shape[1]
        position_Q = torch.linspace(0, tokens - 1, min(tokens, QUERIES) + 1, device=query_BHTD.device)[1:]
        position_Q = position_Q.round().long()
        key_BHTD, value_BHTD = (side.float().repeat_interleave(group, 1) for side in (key_BHTD, value_BHTD))
        scores = query_BHTD[:, :, position_Q].float() @ key_BHTD.mT * softmax_scale
        unseen = torch.arange(tokens, device=scores.device) > position_Q[:, None]
        p_BHQT = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        output_BHQD, square_BHQT = p_BHQT @ value_BHTD, p_BHQT.square()
        # sum_t p_t^2 (v_t - o)(v_t - o)^T, multiplied out so that nothing has queries x tokens x head_dim elements.
        mixed_BHQD, total_BHQ1 = square_BHQT @ value_BHTD, square_BHQT.sum(-1, keepdim=True)
        own_BHDD = (value_BHTD * square_BHQT.sum(2)[..., None]).mT @ value_BHTD
        cross_BHDD = mixed_BHQD.mT @ output_BHQD
        around_BHDD = (total_BHQ1 * output_BHQD).mT @ output_BHQD
        self.spread_HDD = self.spread_HDD + (own_BHDD - cross_BHDD - cross_BHDD.mT + around_BHDD).double().sum(0).cpu()
        self.square_sum_H = self.square_sum_H + total_BHQ1.double().sum((0, 2, 3)).cpu()
        self.outputs.append(output_BHQD.transpose(1, 2).flatten(2).flatten(0, 1).cpu())
        if hidden_BTC is not None:
            self.residuals.append(hidden_BTC[:, position_Q].flatten(0, 1).float().cpu())

    def finish(self, output_weight: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
        """Relative squared error of the stream per squared error of one KV head's scores, and per squared error of its
        values as the output projection sees them: (keys, values) `[KV heads]`, float64.

        Args:
            output_weight: o_proj's weight `[hidden, query heads * head_dim]`.
        """
        output_QX = torch.cat(self.outputs)
        residual_QC = torch.cat(self.residuals) if self.residuals else torch.zeros(len(output_QX), len(output_weight))
        heads, head_dim = self.spread_HDD.shape[:2]
        stream_Q, keys_H = torch.zeros(len(output_QX)), torch.zeros(heads, dtype=torch.float64)
        for start in range(0, len(output_weight), _WEIGHT_ROWS):
            weight_CX = output_weight[start : start + _WEIGHT_ROWS].detach().to("cpu", torch.float32)
            stream_Q += (residual_QC[:, start : start + _WEIGHT_ROWS] + output_QX @ weight_CX.mT).square().sum(1)
            weight_HCD = weight_CX.unflatten(1, (heads, head_dim)).transpose(0, 1).double()
            keys_H += ((weight_HCD @ self.spread_HDD) * weight_HCD).sum((1, 2))
        size = float(stream_Q.double().median().clamp_min(1e-30)) * len(stream_Q)
        # An error of a KV head's scores moves every query head of its group. So does one of its values, but the output
        # moment, in which errors of values are measured, has that sum already.
        key_sum_H = keys_H.unflatten(0, (kv_heads, -1)).sum(1).clamp_min(0.0)
        return key_sum_H / size, self.square_sum_H.unflatten(0, (kv_heads, -1)).mean(1) / size
