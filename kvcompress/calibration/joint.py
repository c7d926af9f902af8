"""The best common low-rank basis of several layers: truncated SVD of their states side by side, from second moments.

M = [M_1 | ... | M_W] with M_l the tokens x channels states of layer l. The right singular vectors of M are the
eigenvectors of M^T M, which is built block by block, so two layers' states are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def joint_axes(layers: Sequence[int], states: Callable[[int], Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """The top `rank` right singular vectors of the layers' states side by side, and their mean squares per token.

    Args:
        states: one layer's states `[tokens, channels]`.

    Returns:
        axes_WXR `[layers, channels, rank]` and variance_R, float64, strongest first. The same states give the same
        axes: each one's largest component is positive.
    """
    moment_YY = _moment(layers, states)
    variance_Y, axes_YY = torch.linalg.eigh(moment_YY)
    variance_R = variance_Y.flip(-1)[:rank].clamp_min(0.0)
    axes_YR = axes_YY.flip(-1)[:, :rank]
    axes_YR = axes_YR * torch.where(axes_YR.gather(0, axes_YR.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    return axes_YR.unflatten(0, (len(layers), -1)), variance_R


def _moment(layers: Sequence[int], states: Callable[[int], Tensor]) -> Tensor:
    """M^T M / tokens, float64."""
    rows: list[list[Tensor]] = [[] for _ in layers]
    for i, first in enumerate(layers):
        one_TX = states(first).double()
        rows[i] = [rows[j][i].mT for j in range(i)]
        for second in layers[i:]:
            other_TX = one_TX if second == first else states(second).double()
            rows[i].append(one_TX.mT @ other_TX / one_TX.shape[0])
    return torch.cat([torch.cat(row, dim=1) for row in rows], dim=0)
