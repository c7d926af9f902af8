"""Trainable nested bases: orthogonal by Cayley's parametrisation, started at principal axes, cut at random ranks.

    U = U_0 (I - A/2)^-1 (I + A/2),   A = X - X^T        latent = (x - mean) @ S U,   x ~ mean + latent @ U^T S^-1

X, one free matrix per layer and KV head, starts at 0, so training starts at the axes U_0 whatever their determinant.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from kvcompress.training.models import RoundTrip


def cayley(free: Tensor) -> Tensor:
    """Orthogonal `(I - A/2)^-1 (I + A/2)` with `A = X - X^T`, for free matrices X `[..., D, D]`; X = 0 gives I."""
    half = (free - free.mT) / 2
    identity = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device)
    orthogonal: Tensor = torch.linalg.solve(identity - half, identity + half)
    return orthogonal


class NestedSide(nn.Module):
    """Keys or values of the compressed layers (L): full-rank bases, of which a round trip keeps the first columns.

    Args:
        mean_LHD: subtracted before projecting; trained for values only, because that of keys cancels in the softmax.
        basis_LHDD: where training starts.
        inverse_LHDD: its inverse.
    """

    def __init__(self, mean_LHD: Tensor, basis_LHDD: Tensor, inverse_LHDD: Tensor, train_mean: bool) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.zeros_like(basis_LHDD))
        self.mean = nn.Parameter(mean_LHD.clone(), requires_grad=train_mean)
        self.register_buffer("basis", basis_LHDD)
        self.register_buffer("inverse", inverse_LHDD)
        self.basis: Tensor
        self.inverse: Tensor

    def projectors(self, kept_LH: Tensor) -> Tensor:
        """`[L, H, D, D]`: into the first `kept_LH` channels and back."""
        turn_LHDD = cayley(self.free)
        mask_LHD = torch.arange(turn_LHDD.shape[-1], device=turn_LHDD.device) < kept_LH[..., None]
        return (self.basis @ turn_LHDD * mask_LHD[..., None, :]) @ (turn_LHDD.mT @ self.inverse)

    def round_trip(self, x_BHTD: Tensor, layer: int, projector_HDD: Tensor) -> Tensor:
        mean_H1D = self.mean[layer, :, None].to(x_BHTD.dtype)
        return mean_H1D + (x_BHTD - mean_H1D) @ projector_HDD.to(x_BHTD.dtype)

    @torch.no_grad()
    def bases(self) -> tuple[Tensor, Tensor, Tensor]:
        """mean_LHD, basis_LHDD and inverse_LHDD as trained, on the CPU, from a rotation computed in float64."""
        turn_LHDD = cayley(self.free.double())
        trained = (self.mean, self.basis.double() @ turn_LHDD, turn_LHDD.mT @ self.inverse.double())
        return tuple(tensor.detach().cpu() for tensor in trained)  # type: ignore[return-value]


class NestedBases(nn.Module):
    """Bases of keys and values of the compressed layers."""

    def __init__(self, layers: list[int], k: NestedSide, v: NestedSide) -> None:
        super().__init__()
        self.layers, self.k, self.v = layers, k, v

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def round_trips(self, kept_SLH: Tensor) -> dict[int, RoundTrip]:
        """By decoder layer: keys and values through their first channels.

        Args:
            kept_SLH: channels kept of keys (0) and values (1), per compressed layer and KV head.
        """
        k_LHDD, v_LHDD = self.k.projectors(kept_SLH[0]), self.v.projectors(kept_SLH[1])

        def of(position: int) -> RoundTrip:
            return lambda key, value: (
                self.k.round_trip(key, position, k_LHDD[position]),
                self.v.round_trip(value, position, v_LHDD[position]),
            )

        return {index: of(position) for position, index in enumerate(self.layers)}


def random_ranks(
    seed: int, step: int, layers: int, heads: int, head_dim: int, nominal: tuple[int, int], focus: float
) -> Tensor:
    """Channels kept in one training step, `[2, layers, heads]`.

    Args:
        nominal: channels of keys and values that everything keeps in a share `focus` of the steps. In the others,
            every entry is drawn by itself, uniform over the multiples of head_dim / 8.
    """
    generator = np.random.Generator(np.random.PCG64([seed, step, 1]))
    if generator.random() < focus and nominal != (head_dim, head_dim):
        return torch.tensor(nominal)[:, None, None].expand(2, layers, heads)
    return torch.from_numpy(generator.integers(1, 9, (2, layers, heads))) * (head_dim // 8)


def in_order(basis_HDD: Tensor, inverse_HDD: Tensor, covariance_HDD: Tensor, block: int) -> tuple[Tensor, ...]:
    """Bases with the channels of every block of neighbours turned to principal axes, and each channel's variance.

    A cut between blocks loses exactly what it lost before; inside a block channels become uncorrelated and the
    strongest comes first, which is what an encoding wants. All tensors float64.
    """
    latent_HDD = basis_HDD.mT @ covariance_HDD @ basis_HDD
    turned, back, variance = [], [], []
    for start in range(0, latent_HDD.shape[-1], block):
        part = slice(start, start + block)
        values, axes = torch.linalg.eigh(latent_HDD[:, part, part])
        values, axes = values.flip(-1), axes.flip(-1)
        # An eigenvector's sign is arbitrary; fixing it makes the same statistics give the same bytes.
        axes = axes * torch.where(axes.gather(-2, axes.abs().argmax(-2, keepdim=True)) < 0, -1.0, 1.0)
        turned.append(basis_HDD[..., part] @ axes)
        back.append(axes.mT @ inverse_HDD[:, part])
        variance.append(values.clamp_min(0.0))
    return torch.cat(turned, -1), torch.cat(back, -2), torch.cat(variance, -1)
