"""The linear algebra of `transmla`: one layer's keys and values as one latent and a small rotary key. Float64.

Let k be a token's keys of all KV heads before RoPE, one vector of D = heads * head_dim channels. RoPE turns the pair
(channel i, channel i + head_dim / 2) of every head by the same angle position * theta_i. A pair is a complex number,
RoPE a multiplication by exp(1j * angle), and any unitary mix of the pairs *of one frequency* across heads commutes
with it: scores do not change when queries and keys go through the same mix. So (RoRoPE) take the principal axes of each
frequency's pairs; few of them hold most of the key's energy, and only those keep RoPE.

- `fold` neighbouring frequencies are mixed as if they were one: more concentrated, and an approximation.
- What loses RoPE is linear in the input, like the values, and both together become one latent by PCA.

Imported by `transmla` only when it works: the module needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Heads of the base model, and channels of the rotary key and of the latent."""

    num_kv_heads: int
    head_dim: int
    rope_dim: int
    rank: int

    @property
    def key_dim(self) -> int:
        """Channels of all heads' keys together, and of all values."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class Latent:
    """One converted layer, float64: [latent | rotary key] = down_CZ [keys, values], both of all heads, before RoPE.

    k_up_HDC takes a head's query to what meets [latent | rotary key]; v_up_HDR takes the latent to a head's value.
    """

    down_CZ: Tensor
    k_up_HDC: Tensor
    v_up_HDR: Tensor


def mean_rotation(theta_F: Tensor, context: int) -> Tensor:
    """The constant closest to RoPE between two tokens, per frequency: E[exp(-1j * distance * theta)], complex128.

    Distances below `context` count by 1 / (1 + distance): every order of magnitude alike, as attention looks nearby
    first. High frequencies average out to little, low ones stay 1.
    """
    mean_F = torch.zeros(len(theta_F), dtype=torch.complex128)
    total = 0.0
    for distance_T in torch.arange(context, dtype=torch.float64).split(1 << 14):
        weight_T = 1.0 / (1.0 + distance_T)
        angle_FT = theta_F[:, None].double() * distance_T
        mean_F += torch.complex(angle_FT.cos() @ weight_T, -(angle_FT.sin() @ weight_T))
        total += float(weight_T.sum())
    return mean_F / total


def rotation(kv_ZZ: Tensor, sizes: Sizes, fold: int, unitary: bool) -> Tensor:
    """An orthogonal map of keys, k' = map^T k: principal axes of each group of `fold` frequencies.

    The first rope_dim channels of k' are the leading axes of every group, in the order of `transmla.kept_frequencies`;
    pair i is channels i and i + rope_dim / 2. The rest are the other axes.

    Args:
        kv_ZZ: E[z z^T] of z = [keys before RoPE, values].
        unitary: mix pairs as complex numbers; else real and imaginary parts alike, as the paper does.
    """
    half, heads = sizes.head_dim // 2, sizes.num_kv_heads
    pairs = sizes.rope_dim * fold // sizes.head_dim
    rope: tuple[list[Tensor], list[Tensor]] = ([], [])
    rest: list[Tensor] = []
    for group in range(half // fold):
        frequency_f = torch.arange(group * fold, (group + 1) * fold)
        real_n = (torch.arange(heads)[:, None] * sizes.head_dim + frequency_f).flatten()
        axes_nm = _pair_axes(kv_ZZ, real_n, real_n + half, unitary)
        real_part = torch.zeros(sizes.key_dim, axes_nm.shape[1], dtype=torch.float64)
        imag_part = torch.zeros_like(real_part)
        real_part[real_n], real_part[real_n + half] = axes_nm.real, axes_nm.imag
        imag_part[real_n], imag_part[real_n + half] = -axes_nm.imag, axes_nm.real
        for kept, part in zip(rope, (real_part, imag_part), strict=True):
            kept.append(part[:, :pairs])
            rest.append(part[:, pairs:])
    return torch.cat([*rope[0], *rope[1], *rest], dim=1)


def latent(
    kv_ZZ: Tensor, second_ZZ: Tensor, map_KK: Tensor, sizes: Sizes, balance: float, mean_F: Tensor | None
) -> Latent:
    """Joint low rank of the keys without RoPE and the values, brought to one size first.

    Keys are divided by the ratio of the mean channel norms, keys over values times `balance`.

    Args:
        kv_ZZ: as in `rotation`.
        second_ZZ: what the principal axes are taken of: kv_ZZ itself, or W W^T of the projections' weights alone.
        map_KK: from `rotation`.
        mean_F: `mean_rotation`, to stand for RoPE where it is dropped; it goes into the query's side. None: nothing.
    """
    keys = sizes.key_dim
    rope_KR, rest_KN = map_KK.split([sizes.rope_dim, keys - sizes.rope_dim], dim=1)
    count = rest_KN.shape[1]
    select_ZM = torch.block_diag(rest_KN, torch.eye(keys, dtype=torch.float64))
    norm_M = torch.einsum("zm,zy,ym->m", select_ZM, kv_ZZ, select_ZM).clamp_min(0).sqrt()
    ratio = float(norm_M[:count].mean() / (norm_M[count:].mean() * balance)) if count else 1.0
    if not 0.0 < ratio < float("inf"):  # keys or values are zero throughout
        ratio = 1.0
    select_ZM[:, :count] /= ratio
    axes_MR = leading_axes(select_ZM.mT @ second_ZZ @ select_ZM, sizes.rank)
    rope_RZ = torch.cat([rope_KR.mT, torch.zeros(sizes.rope_dim, keys, dtype=torch.float64)], dim=1)
    down_CZ = torch.cat([(select_ZM @ axes_MR).mT, rope_RZ])
    key_up_KR = rest_KN @ (ratio * axes_MR[:count])
    heads = (sizes.num_kv_heads, sizes.head_dim)
    key_up_HDR = key_up_KR.unflatten(0, heads)
    if mean_F is not None:
        key_up_HDR = turn_pairs(key_up_HDR, mean_F)
    k_up_HDC = torch.cat([key_up_HDR, rope_KR.unflatten(0, heads)], dim=-1)
    return Latent(down_CZ, k_up_HDC, axes_MR[count:].unflatten(0, heads))


def turn_pairs(x_HDN: Tensor, factor_F: Tensor) -> Tensor:
    """Every channel pair (i, i + head_dim / 2) along D as a complex number, times one factor per frequency. Float64."""
    real, imaginary = x_HDN.double().chunk(2, dim=1)
    turned = torch.complex(real, imaginary) * factor_F[:, None]
    return torch.cat([turned.real, turned.imag], dim=1)


def leading_axes(second_MM: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, as columns `[M, rank]`."""
    return _fix_phase(torch.linalg.eigh(second_MM)[1].flip(-1)[:, :rank])


def _pair_axes(kv_ZZ: Tensor, real_n: Tensor, imag_n: Tensor, unitary: bool) -> Tensor:
    """Eigenvectors (complex) of E[z z^H] for the pairs z = real + 1j * imaginary, largest eigenvalue first."""
    second = kv_ZZ[real_n][:, real_n] + kv_ZZ[imag_n][:, imag_n]
    if unitary:
        second = torch.complex(second, kv_ZZ[imag_n][:, real_n] - kv_ZZ[real_n][:, imag_n])
    return _fix_phase(torch.linalg.eigh(second)[1].flip(-1)).to(torch.complex128)


def _fix_phase(vectors: Tensor) -> Tensor:
    """An eigenvector's sign or phase is arbitrary; fixing it makes the same moments give the same bytes."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    fixed: Tensor = vectors * (largest.conj() / largest.abs())
    return fixed
