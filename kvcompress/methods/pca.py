"""PCA basis per KV head, in the metric that attention sees.

Plain PCA minimises the error of keys and values. Attention sees q . k and the output after W_o, so the error worth
minimising is that of scores and of the layer's output: with S_K = E[q q^T]^(1/2) over the query heads of the group and
S_V = (sum_h W_o,h^T W_o,h)^(1/2), take the principal axes U of S (x - mean) and store

    basis = S U        inverse = U^T S^-1

The map stays linear and static. Where the samples' first tokens are massive (Sun et al., 2024, arXiv 2402.17762), two
of the axes are theirs and the others are the principal ones of the rest. Keys are taken after RoPE. Related: KQ-SVD and
CARE (query-aware low rank), EigenAttention (Saxena et al., 2024, arXiv 2408.05646) for post-RoPE per-head bases.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, StrictFloat, StrictInt

from kvcompress.geometry import ModelGeometry
from kvcompress.methods.base import BasisMethod, LatentBasis, channels
from kvcompress.recipe import Kind, Pair, StageConfig

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.calibration.statistics import LayerStatistics, Moments


def _rank(value: int | float) -> int | float:
    if isinstance(value, float) and not 0.0 < value <= 1.0:
        raise ValueError("expected a share of head_dim above 0 and up to 1.0, or a whole number of channels")
    if isinstance(value, int) and value < 1:
        raise ValueError("expected at least one channel")
    return value


Rank = Annotated[StrictInt | StrictFloat, AfterValidator(_rank)]

_MASSIVE = 16.0
"""Energy of first tokens, in parts of the average token's, from which they get axes of their own."""

_MASSIVE_AXES = 2
"""As many as a record can hold exactly."""

_RIDGE = 1e-3
"""Share of the mean eigenvalue added to a metric, so that directions no query uses keep a finite inverse."""

_FAINT = 1e-6
"""Mean eigenvalue of a head's metric, in parts of the layer's, below which its ridge does not follow it: nothing may
look at a head at all.
"""


class RankPair(Pair):
    k: Rank
    v: Rank


class PcaConfig(StageConfig):
    kind: ClassVar[Kind] = "basis"
    method: Literal["pca"] = "pca"
    metric: Literal["attention", "none"] = Field(
        "attention", description="error to minimise: attention's, or that of K and V"
    )
    rank: RankPair = Field(
        RankPair(k=1.0, v=1.0), description="channels kept: a share of head_dim (1.0) or a count (64)"
    )


class Pca(BasisMethod[PcaConfig]):
    name = "pca"
    summary = "Per-head principal axes of post-RoPE keys and of values, in attention's metric"
    paper = "EigenAttention, arXiv 2408.05646; metric after KQ-SVD and CARE"
    config = PcaConfig

    def ranks(self, config: PcaConfig, geometry: ModelGeometry) -> tuple[int, int]:
        return channels(config.rank.k, geometry.head_dim), channels(config.rank.v, geometry.head_dim)

    def fit(self, config: PcaConfig, statistics: LayerStatistics) -> tuple[LatentBasis, LatentBasis]:
        seen = config.metric == "attention"
        return (
            _principal_axes(statistics.keys, statistics.query_moment_HDD if seen else None),
            _principal_axes(statistics.values, statistics.output_moment_HDD if seen else None),
        )


def _principal_axes(moments: Moments, metric_HDD: Tensor | None) -> LatentBasis:
    """Eigenvectors of S C S per head, S the square root of the metric (identity when None). Float64 inside."""
    import torch

    covariance = moments.covariance_HDD.double()
    if metric_HDD is None:
        root = inverse_root = torch.eye(covariance.shape[-1], dtype=torch.float64)
    else:
        root, inverse_root = _square_roots(metric_HDD.double())
    seen = root @ covariance @ root
    lead = _massive_axes(root @ moments.first_HDD.double() @ root, seen)
    rest = torch.eye(seen.shape[-1], dtype=torch.float64) - lead @ lead.mT
    # Above all others, so that the eigenvectors are these axes and those of the rest.
    above = _trace(seen) * (lead * torch.tensor([2.0, 3.0])) @ lead.mT
    axes = torch.linalg.eigh(rest @ seen @ rest + above).eigenvectors
    variance = torch.einsum("hdr,hde,her->hr", axes, seen, axes).clamp_min(0.0)
    order = variance.argsort(dim=-1, descending=True, stable=True)
    variance, axes = variance.gather(-1, order), axes.gather(-1, order[:, None].expand_as(axes))
    # An eigenvector's sign is arbitrary; fixing it makes the same statistics give the same bytes.
    axes = axes * torch.where(axes.gather(-2, axes.abs().argmax(-2, keepdim=True)) < 0, -1.0, 1.0)
    return LatentBasis(
        moments.mean_HD.float(),
        (root @ axes).float().contiguous(),
        (axes.mT @ inverse_root).float().contiguous(),
        variance.float(),
    )


def _massive_axes(first_HDD: Tensor, all_HDD: Tensor) -> Tensor:
    """Axes of massive first tokens `[heads, D, 2]`; zeros in heads whose first tokens are like the others.

    A massive token that leaks into many channels, as it does where an axis is a compromise between it and all others,
    makes each of them extreme in that token. On axes of its own it is extreme in two, which exact outliers can hold.
    """
    import torch

    axes = torch.linalg.eigh(first_HDD).eigenvectors[..., -_MASSIVE_AXES:]
    massive: Tensor = axes * (_trace(first_HDD) > _MASSIVE * _trace(all_HDD))
    return massive


def _trace(x_HDD: Tensor) -> Tensor:
    """`[heads, 1, 1]`."""
    return x_HDD.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


def _square_roots(moment_HDD: Tensor) -> tuple[Tensor, Tensor]:
    """S and S^-1 with S S = moment (ridged) for one layer's symmetric positive matrices `[heads, D, D]`."""
    import torch

    values, vectors = torch.linalg.eigh(moment_HDD)
    mean = values.mean(-1, keepdim=True)
    # Where nothing looks at the whole layer, all errors are alike: plain principal axes.
    least = _FAINT * mean.mean() if bool(mean.mean() > 0) else mean.new_ones(()) / _RIDGE
    ridged = values.clamp_min(0.0) + _RIDGE * mean.maximum(least)
    return (vectors * ridged.sqrt()[..., None, :]) @ vectors.mT, (vectors / ridged.sqrt()[..., None, :]) @ vectors.mT
