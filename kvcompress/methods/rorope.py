"""The linear algebra of `transmla`: one layer's keys and values as one latent and a small rotary key. Float64.

Let k be a token's keys of all KV heads before RoPE, one vector of D_kv = heads * head_dim channels. RoPE turns the pair
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
from typing import Literal

import torch
from torch import Tensor

RIDGE = 1e-3
"""Share of the mean eigenvalue added to a metric, so that directions without weight keep a finite inverse."""

Whitening = Literal["none", "activation", "attention"]


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
class Moments:
    """What a conversion may know of one layer. z = [keys before RoPE, values], all heads; not centred.

    query_HDD: E[q q^T] of queries before RoPE, summed over the query heads of each KV head.
    output_HDD: the same sum of W_o,h^T W_o,h.
    """

    kv_ZZ: Tensor
    mean_Z: Tensor
    query_HDD: Tensor
    output_HDD: Tensor


@dataclass(frozen=True)
class Rotation:
    """An orthogonal map of keys, k' = map^T k, whose first rope_dim channels keep RoPE: pair i is (i, i + rope_dim / 2).

    frequencies_F: radians per token of each of those pairs.
    """

    map_KK: Tensor
    frequencies_F: Tensor


@dataclass(frozen=True)
class Latent:
    """One converted layer, float64. Of a key k' = map^T k and a value v: [latent | rotary key] = down [k', v].

    k_up_HDC: takes a head's query to [latent | rotary key]; v_up_HDR: takes the latent to the head's value.
    """

    down_CZ: Tensor
    k_up_HDC: Tensor
    v_up_HDR: Tensor
    frequencies_F: Tensor


class MomentAccumulator:
    """Sums the moments of z over batches."""

    def __init__(self) -> None:
        self.tokens = 0
        self.kv_ZZ: Tensor | None = None

    def add(self, query_THD: Tensor, kv_TZ: Tensor, num_kv_heads: int) -> None:
        """Queries `[tokens, query heads, head_dim]` and z `[tokens, 2 * key_dim]`, before RoPE."""
        kv = kv_TZ.double()
        query_HND = query_THD.double().unflatten(1, (num_kv_heads, -1)).permute(1, 0, 2, 3).flatten(1, 2)
        sums = (kv.mT @ kv, kv.sum(0), query_HND.mT @ query_HND)
        if self.kv_ZZ is None:
            self.kv_ZZ, self.sum_Z, self.query_HDD = sums
        else:
            self.kv_ZZ, self.sum_Z, self.query_HDD = (
                total + new for total, new in zip((self.kv_ZZ, self.sum_Z, self.query_HDD), sums, strict=True)
            )
        self.tokens += len(kv)

    def moments(self, output_weight_OQ: Tensor) -> Moments:
        """Close the layer; `output_weight_OQ` is o_proj's `[hidden, query heads * head_dim]`."""
        assert self.kv_ZZ is not None, "no data was added"
        heads, head_dim = self.query_HDD.shape[:2]
        blocks = output_weight_OQ.detach().unflatten(1, (heads, -1, head_dim)).unbind(1)
        output = torch.stack([rows.mT @ rows for rows in (block.flatten(0, 1).double() for block in blocks)])
        parts = (self.kv_ZZ / self.tokens, self.sum_Z / self.tokens, self.query_HDD / self.tokens, output)
        return Moments(*(part.cpu() for part in parts))


def mean_rotation(theta_F: Tensor, context: int) -> Tensor:
    """The constant that comes closest to RoPE between two tokens, per frequency: E[exp(-1j * distance * theta)].

    Distances up to `context` count by 1 / (1 + distance), every order of magnitude alike: attention looks nearby first.
    High frequencies average out to little, low ones stay 1.
    """
    distance_T = torch.arange(context, dtype=torch.float64)
    weight_T = 1.0 / (1.0 + distance_T)
    mean = torch.zeros(len(theta_F), dtype=torch.complex128)
    for chunk in torch.arange(context).split(1 << 14):
        angle_FT = theta_F[:, None].double() * distance_T[chunk]
        mean += (weight_T[chunk] * torch.exp(-1j * angle_FT)).sum(1)
    return mean / weight_T.sum()


def rotation(
    moments: Moments, sizes: Sizes, theta_F: Tensor, fold: int, unitary: bool, mean_F: Tensor | None
) -> Rotation:
    """Principal axes of each group of `fold` frequencies, and which of them keep RoPE.

    Args:
        theta_F: the base model's frequencies, head_dim / 2 of them.
        unitary: mix pairs as complex numbers; else real and imaginary parts alike, as the paper does.
        mean_F: what replaces RoPE where it is dropped (`mean_rotation`). With it, pairs keep RoPE in order of what
            dropping it would cost the scores, at the mean of the frequencies they mix; without it, an equal number per
            frequency group, leading axes first, at the group's own frequencies, as the paper does.
    """
    half = sizes.head_dim // 2
    groups = half // fold
    energy, axes, members = [], [], []
    for group in range(groups):
        frequency_f = torch.arange(group * fold, (group + 1) * fold)
        real_n = (torch.arange(sizes.num_kv_heads)[:, None] * sizes.head_dim + frequency_f).flatten()
        values_m, vectors_nm = _pair_axes(moments.kv_ZZ, real_n, real_n + half, unitary)
        energy.append(values_m)
        axes.append(vectors_nm)
        members.append(real_n)
    per_group = len(members[0])
    kept = torch.zeros(groups, per_group, dtype=torch.bool)
    pairs = sizes.rope_dim // 2
    theta_n = [theta_F.double()[real_n % sizes.head_dim] for real_n in members]
    if mean_F is None:
        count = pairs // groups
        assert count * groups == pairs, "the rotary key does not divide over the frequency groups"
        kept[:, :count] = True
        strides = [int(m * fold // count) if count < fold else m % fold for m in range(count)]
        frequency = torch.zeros(groups, per_group, dtype=torch.float64)
        frequency[:, :count] = theta_F.double().view(groups, fold)[:, strides]
    else:
        lost_n = [(1.0 - mean_F[real_n % sizes.head_dim].abs().square()) for real_n in members]
        query_KK = torch.block_diag(*moments.query_HDD)
        cost = torch.stack(
            [
                energy[group] * _pair_energy(query_KK, members[group], half, axes[group]) * (lost_n[group] @ share)
                for group, share in enumerate(axis.abs().square() for axis in axes)
            ]
        )
        order = cost.flatten().argsort(descending=True, stable=True)
        kept.view(-1)[order[:pairs]] = True
        frequency = torch.stack(
            [theta @ axis.abs().square() for theta, axis in zip(theta_n, axes, strict=True)]
        )
    columns = torch.zeros(2, sizes.key_dim, groups, per_group, dtype=torch.float64)
    for group, real_n in enumerate(members):
        axis = axes[group]
        columns[0, real_n, group], columns[0, real_n + half, group] = axis.real, axis.imag
        columns[1, real_n, group], columns[1, real_n + half, group] = -axis.imag, axis.real
    rope = columns[:, :, kept].permute(1, 0, 2).flatten(1)
    rest = columns[:, :, ~kept].permute(1, 0, 2).flatten(1)
    return Rotation(torch.cat([rope, rest], 1), frequency[kept])


def latent(
    moments: Moments,
    turned: Rotation,
    sizes: Sizes,
    whitening: Whitening,
    balance: float,
    mean_F: Tensor | None,
    weight_ZX: Tensor | None = None,
) -> Latent:
    """Joint low rank of the keys without RoPE and the values.

    Both are brought to one size first: keys are divided by the ratio of the mean channel norms (times `balance`).

    Args:
        whitening: `none` takes the principal axes of the weights alone, as if inputs were white; `activation` those of
            the activations W E[x x^T] W^T, that is the weights in the metric of the input covariance (TransMLA's PCA,
            and CARE's whitened SVD); `attention` weighs their errors by what they do to scores and to the layer's
            output, where a constant added to all keys does nothing.
        mean_F: see `rotation`; it goes into the query's side, k_up.
        weight_ZX: rows of the key and value projections, for `none`.
    """
    keys = sizes.key_dim
    rope_KR, rest_KN = turned.map_KK.split([sizes.rope_dim, keys - sizes.rope_dim], dim=1)
    query_KN = rest_KN if mean_F is None else _turn_queries(rest_KN, mean_F, sizes)
    select = torch.block_diag(rest_KN, torch.eye(keys, dtype=torch.float64))
    count = rest_KN.shape[1]
    norm = (select.mT @ moments.kv_ZZ @ select).diagonal().clamp_min(0).sqrt()
    ratio = float(norm[:count].mean() / (norm[count:].mean() * balance)) if count else 1.0
    ratio = ratio or 1.0
    scale = torch.ones(count + keys, dtype=torch.float64)
    scale[:count] = 1.0 / ratio
    scaled_ZM = select * scale
    if whitening == "none":
        assert weight_ZX is not None
        rows = scaled_ZM.mT @ weight_ZX.double()
        second = rows @ rows.mT
    else:
        second = scaled_ZM.mT @ moments.kv_ZZ @ scaled_ZM
    root = inverse_root = torch.eye(len(second), dtype=torch.float64)
    if whitening == "attention":
        mean_M = scaled_ZM.mT @ moments.mean_Z
        constant_M = torch.cat([mean_M[:count], torch.zeros(keys, dtype=torch.float64)])
        cross = torch.outer(constant_M, mean_M)
        second = second - cross - cross.mT + torch.outer(constant_M, constant_M)
        key_metric = query_KN.mT @ torch.block_diag(*moments.query_HDD) @ query_KN
        value_metric = torch.block_diag(*moments.output_HDD) * balance
        root, inverse_root = _roots(
            torch.block_diag(
                _relative(key_metric, second[:count, :count]), _relative(value_metric, second[count:, count:])
            )
        )
    axes = leading_axes(root @ second @ root, sizes.rank)
    encode_RM, decode_MR = axes.mT @ root, inverse_root @ axes
    down = torch.cat([encode_RM @ scaled_ZM.mT, torch.cat([rope_KR.mT, torch.zeros(sizes.rope_dim, keys)], 1)])
    k_up = torch.cat([query_KN @ (ratio * decode_MR[:count]), rope_KR], 1)
    heads = (sizes.num_kv_heads, sizes.head_dim)
    return Latent(down, k_up.unflatten(0, heads), decode_MR[count:].unflatten(0, heads), turned.frequencies_F)


def undo_mean(k_up_HDR: Tensor, mean_F: Tensor) -> Tensor:
    """The latent's part of k_up before `mean_rotation` went into it: what takes the latent back to keys."""
    return _multiply(k_up_HDR, 1.0 / mean_F)


def _turn_queries(map_KN: Tensor, mean_F: Tensor, sizes: Sizes) -> Tensor:
    """The map of the keys as the query side sees it: every pair of every head times its mean rotation."""
    return _multiply(map_KN.unflatten(0, (sizes.num_kv_heads, sizes.head_dim)), mean_F).flatten(0, 1)


def _multiply(x_HDN: Tensor, factor_F: Tensor) -> Tensor:
    """Channel pairs along D as complex numbers, times one factor per frequency."""
    real, imaginary = x_HDN.double().chunk(2, dim=1)
    turned = torch.complex(real, imaginary) * factor_F[:, None]
    return torch.cat([turned.real, turned.imag], dim=1)


def _pair_axes(kv_ZZ: Tensor, real_n: Tensor, imag_n: Tensor, unitary: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and vectors (complex) of E[z z^H] for the pairs z = real + 1j * imaginary."""
    second = (kv_ZZ[real_n][:, real_n] + kv_ZZ[imag_n][:, imag_n]).to(torch.complex128)
    if unitary:
        second = second + 1j * (kv_ZZ[imag_n][:, real_n] - kv_ZZ[real_n][:, imag_n])
        values, vectors = torch.linalg.eigh(second)
    else:
        values, vectors = torch.linalg.eigh(second.real)
        vectors = vectors.to(torch.complex128)
    # An eigenvector's phase is arbitrary; fixing it makes the same moments give the same bytes.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * (largest.conj() / largest.abs())
    return values.flip(-1).clamp_min(0.0), vectors.flip(-1)


def _pair_energy(query_KK: Tensor, real_n: Tensor, half: int, axis_nm: Tensor) -> Tensor:
    """E |u^H q|^2 of the queries of all heads along each axis u, as the heads' keys see them."""
    imag_n = real_n + half
    second = (query_KK[real_n][:, real_n] + query_KK[imag_n][:, imag_n]).to(torch.complex128)
    second = second + 1j * (query_KK[imag_n][:, real_n] - query_KK[real_n][:, imag_n])
    return torch.einsum("nm,np,pm->m", axis_nm.conj(), second, axis_nm).real


def leading_axes(second_MM: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, as columns `[M, rank]`."""
    _, vectors = torch.linalg.eigh(second_MM)
    axes = vectors.flip(-1)[:, :rank]
    return axes * torch.where(axes.gather(0, axes.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)


def _relative(metric: Tensor, second: Tensor) -> Tensor:
    """A metric in which the data's own energy is 1: errors of scores and of outputs then count alike."""
    return metric / (metric * second).sum().clamp_min(torch.finfo(torch.float64).tiny) if len(metric) else metric


def _roots(metric_MM: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(metric_MM)
    ridged = values.clamp_min(0.0) + RIDGE * values.mean()
    return (vectors * ridged.sqrt()) @ vectors.mT, (vectors / ridged.sqrt()) @ vectors.mT
