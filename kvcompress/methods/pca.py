"""PCA basis per KV head, in the metric that attention sees.

Plain PCA minimises the error of keys and values. Attention sees q . k and the output after W_o, so the error worth
minimising is that of scores and of the layer's output: with S_K = E[q q^T]^(1/2) over the query heads of the group and
S_V = (sum_h W_o,h^T W_o,h)^(1/2), take the principal axes U of S (x - mean) and store

    basis = S U        inverse = U^T S^-1

The map stays linear and static. Keys are taken after RoPE. Related: KQ-SVD and CARE (query-aware low rank),
EigenAttention (Saxena et al., 2024, arXiv 2408.05646) for post-RoPE per-head bases.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, StrictFloat, StrictInt

from kvcompress.geometry import ModelGeometry
from kvcompress.methods.base import BasisMethod, LatentBasis, channels
from kvcompress.recipe import Kind, Pair, StageConfig

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.calibration.statistics import LayerStatistics


def _rank(value: int | float) -> int | float:
    if isinstance(value, float) and not 0.0 < value <= 1.0:
        raise ValueError("expected a share of head_dim above 0 and up to 1.0, or a whole number of channels")
    if isinstance(value, int) and value < 1:
        raise ValueError("expected at least one channel")
    return value


Rank = Annotated[StrictInt | StrictFloat, AfterValidator(_rank)]

_RIDGE = 1e-3
"""Share of the mean eigenvalue added to a metric, so that directions no query uses keep a finite inverse."""


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
        keys, values = statistics.keys, statistics.values
        if config.metric == "none":
            return _principal_axes(keys.mean_HD, keys.covariance_HDD, None), _principal_axes(
                values.mean_HD, values.covariance_HDD, None
            )
        return (
            _principal_axes(keys.mean_HD, keys.covariance_HDD, statistics.query_moment_HDD),
            _principal_axes(values.mean_HD, values.covariance_HDD, statistics.output_moment_HDD),
        )


def _principal_axes(mean_HD: Tensor, covariance_HDD: Tensor, moment_HDD: Tensor | None) -> LatentBasis:
    """Eigenvectors of S C S per head, S the square root of `moment` (identity when None). Float64 inside."""
    import torch

    covariance = covariance_HDD.double()
    if moment_HDD is None:
        root = inverse_root = torch.eye(covariance.shape[-1], dtype=torch.float64)
    else:
        root, inverse_root = _square_roots(moment_HDD.double())
    variance, axes = torch.linalg.eigh(root @ covariance @ root)
    variance, axes = variance.flip(-1).clamp_min(0.0), axes.flip(-1)
    # An eigenvector's sign is arbitrary; fixing it makes the same statistics give the same bytes.
    axes = axes * torch.where(axes.gather(-2, axes.abs().argmax(-2, keepdim=True)) < 0, -1.0, 1.0)
    return LatentBasis(
        mean_HD.float(),
        (root @ axes).float().contiguous(),
        (axes.mT @ inverse_root).float().contiguous(),
        variance.float(),
    )


def _square_roots(moment_HDD: Tensor) -> tuple[Tensor, Tensor]:
    """S and S^-1 with S S = moment (ridged) for symmetric positive matrices `[..., D, D]`."""
    import torch

    values, vectors = torch.linalg.eigh(moment_HDD)
    ridged = values.clamp_min(0.0) + _RIDGE * values.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return (vectors * ridged.sqrt()[..., None, :]) @ vectors.mT, (vectors / ridged.sqrt()[..., None, :]) @ vectors.mT
