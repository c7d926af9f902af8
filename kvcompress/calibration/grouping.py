"""Which neighbouring layers may share one low-rank latent, without a decomposition of all of them together.

For a matrix M and a rank r the error of the best approximation is E_r(M)^2 = |M|^2 - (s_1^2 + ... + s_r^2), and
|[A B]|^2 = |A|^2 + |B|^2. So lower bounds on the top singular values of a concatenation give an upper bound on its
error. Such bounds come from appending one block after the other to a truncated decomposition: with V orthonormal,
[M V, B] = [M B] diag(V, I) has singular values at most those of [M B], and cutting it to its top directions again only
lowers them (Brand 2002, incremental SVD; Shamrai 2026, Concatenated Matrix SVD, arXiv 2601.11626).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 16 * torch.finfo(torch.float64).eps
"""Relative error of a sum of squares and of its eigenvalues, per column: the bound must hold in floating point too."""

_SPARE = 2
"""Directions kept while layers are appended, as a multiple of the rank: what is cut early loosens the bound."""


@dataclass(frozen=True)
class Sketch:
    """What is kept of blocks side by side: their energy, and their projection on the directions found so far."""

    projected_TR: Tensor
    """[blocks] V with orthonormal V, columns by falling norm, orthogonal to each other, float64."""
    energy_R: Tensor
    """Squared norms of its columns: lower bounds on the squared singular values, one by one."""
    energy: float
    """Squared Frobenius norm of all blocks."""
    columns: int
    """Columns of all blocks."""

    @classmethod
    def empty(cls, tokens: int) -> Sketch:
        zero = torch.zeros(tokens, 0, dtype=torch.float64)
        return cls(zero, torch.zeros(0, dtype=torch.float64), 0.0, 0)

    def append(self, block_TD: Tensor, keep: int) -> Sketch:
        """The sketch with one more block, cut to its `keep` top directions."""
        block = block_TD.double()
        wide_TX = torch.cat([self.projected_TR, block], dim=1)
        energies, axes = torch.linalg.eigh(wide_TX.mT @ wide_TX)
        kept = min(keep, wide_TX.shape[1])
        projected = wide_TX @ axes.flip(-1)[:, :kept]
        return Sketch(
            projected,
            energies.flip(-1)[:kept].clamp_min(0.0),
            self.energy + float(block.square().sum()),
            self.columns + block.shape[1],
        )

    def error(self, rank: int) -> float:
        """At least the relative Frobenius error of the best approximation of the blocks of this rank."""
        if self.energy == 0.0 or rank >= min(self.columns, self.projected_TR.shape[0]):
            return 0.0
        lost = self.energy - float(self.energy_R[:rank].sum()) + _ROUNDING * self.columns * self.energy
        return min(1.0, math.sqrt(max(lost, 0.0) / self.energy))


Blocks = Callable[[int], dict[str, Tensor]]
"""One layer's states by side, `[tokens, channels]`, the same tokens for every layer."""


def group_layers(
    layers: Sequence[int], blocks: Blocks, ranks: Mapping[str, int], max_error: float, longest: int
) -> list[tuple[int, ...]]:
    """Walk the layers in order and let each join the group before it while the bound stays within `max_error`.

    Args:
        layers: in order; only neighbours in it can be in one group.
        ranks: of a group's latent, by side, however many layers share it.
        max_error: allowed relative error of each side of each group.
        longest: layers in a group at most.

    Raises:
        ValueError: a layer by itself is above `max_error` already.
    """
    groups: list[list[int]] = []
    sketches: dict[str, Sketch] = {}
    for index in layers:
        found = blocks(index)
        if groups and len(groups[-1]) < longest:
            joined = {side: sketches[side].append(found[side], _SPARE * rank) for side, rank in ranks.items()}
            if all(joined[side].error(rank) <= max_error for side, rank in ranks.items()):
                groups[-1].append(index)
                sketches = joined
                continue
        sketches = {
            side: Sketch.empty(found[side].shape[0]).append(found[side], _SPARE * rank) for side, rank in ranks.items()
        }
        for side, rank in ranks.items():
            alone = sketches[side].error(rank)
            if alone > max_error:
                raise ValueError(
                    f"xkv: {'keys' if side == 'k' else 'values'} of layer {index} by themselves have a relative error "
                    f"of {alone:.3f} at rank {rank}, above max_error {max_error:g}; raise rank.{side} or max_error"
                )
        groups.append([index])
    return [tuple(group) for group in groups]
