"""MatryoshkaKV: orthogonal bases per KV head, trained so that every number of leading channels works.

    k' = (k - mean_k) U_K[:, :r]      q' = q U_K[:, :r]      v' = (v - mean_v) U_V[:, :r]
    output = softmax(q' . k' / sqrt(d)) v' U_V[:, :r]^T + mean_v

(q . mean_k is the same for all keys of a query and cancels in the softmax; mean_v becomes part of the output.) Keys
are taken after RoPE; one U_K serves all query heads of a KV head. U starts at the principal axes and stays orthogonal
through Cayley's parametrisation, turned relative to those axes. Every training step draws a rank per layer, head, K
and V from the multiples of d / 8, and minimises

    kl_weight * KL(model || model with projections) + (1 - kl_weight) * next-token cross-entropy

with the model frozen. Lin et al., ICLR 2025, arXiv 2410.14731 (there 0.25 and 0.75, learning rate 1e-3).

Beyond the paper, because it measured better: `metric: attention` trains the rotation in the metric that attention sees
(basis S U, inverse U^T S^-1; see `pca`), and a share `focus` of the steps is at exactly `rank` everywhere, as serving
will be. `metric: none, focus: 0.0, kl_weight: 0.25, learning_rate: 1.0e-3` is the paper's training.

`budget: search` is the paper's greedy search over ranks, with one difference: the heads of a layer share a rank,
because a cache page has one record width per layer. Where keys and values get different bits, `trade: false` keeps
the bytes as planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from kvcompress.codec.bands import CHANNEL_GROUP
from kvcompress.geometry import ModelGeometry
from kvcompress.methods.base import BasisMethod, LatentBasis, LayerBases, Profile, TrainedConfig, channels
from kvcompress.methods.context import Context
from kvcompress.methods.pca import Pca, PcaConfig, RankPair
from kvcompress.recipe import Kind

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.calibration.corpus import Calibration
    from kvcompress.calibration.statistics import LayerStatistics
    from kvcompress.checkpoint.reader import Checkpoint
    from kvcompress.training.budget import Ranks
    from kvcompress.training.distill import Progress
    from kvcompress.training.nested import NestedBases
    from kvcompress.training.state import StateFile

_PARTS = ("mean_HD", "basis_HDR", "inverse_HRD")

_EPSILON = 1e-6

SEARCH_SAMPLES = 4
"""Calibration samples on which the search measures the loss."""


class MatryoshkaConfig(TrainedConfig):
    kind: ClassVar[Kind] = "basis"
    whole_models: ClassVar[int] = 1
    method: Literal["matryoshka"] = "matryoshka"
    rank: RankPair = Field(
        RankPair(k=0.5, v=0.5), description="channels kept: a share of head_dim (0.5) or a count (32)"
    )
    metric: Literal["attention", "none"] = Field(
        "attention", description="space in which bases are orthogonal: attention's, or that of K and V (the paper)"
    )
    budget: Literal["uniform", "search"] = Field(
        "uniform", description="every layer at `rank`, or ranks found per layer and side that add up to the same"
    )
    trade: bool = Field(True, description="whether the search may give channels of keys to values and back")
    steps: int = Field(300, ge=1, description="training steps")
    learning_rate: float = Field(1e-3, gt=0.0, description="at its highest; it rises first and then falls to zero")
    kl_weight: float = Field(0.25, ge=0.0, le=1.0, description="share of the KL divergence in the loss")
    focus: float = Field(0.5, ge=0.0, lt=1.0, description="share of the steps at exactly `rank`; 0 is the paper")


class Matryoshka(BasisMethod[MatryoshkaConfig]):
    name = "matryoshka"
    summary = "Trained nested per-head bases: one checkpoint serves at any smaller rank"
    paper = "MatryoshkaKV, Lin et al., ICLR 2025, arXiv 2410.14731"
    config = MatryoshkaConfig

    def ranks(self, config: MatryoshkaConfig, geometry: ModelGeometry) -> tuple[int, int]:
        return channels(config.rank.k, geometry.head_dim), channels(config.rank.v, geometry.head_dim)

    def fit(self, config: MatryoshkaConfig, statistics: LayerStatistics) -> tuple[LatentBasis, LatentBasis]:
        """Where training starts."""
        return Pca().fit(PcaConfig(metric=config.metric), statistics)

    def fit_model(
        self, config: MatryoshkaConfig, context: Context, profiles: Sequence[Profile]
    ) -> dict[int, LayerBases]:
        from kvcompress.training import distributed
        from kvcompress.training.state import StateFile

        data = context.sample(config.samples, config.length)
        start = {index: self.fit(config, context.statistics(index)) for index in context.compressed_layers}
        nominal = profiles[0].k_rank, profiles[0].v_rank
        job = _Job(context.checkpoint, config, data, start, nominal, context.seed, context.device, context.dtype)
        state = StateFile(context.work, f"{context.unit}:training", data.sha256)
        model, nested = distributed.everywhere(_train, job, state=state, progress=context.progress)
        ranks = [nominal] * len(start)
        if config.budget == "search":
            ranks = _search(config, context, model, nested, nominal)
        return {
            index: LayerBases(*(side.cut(rank) for side, rank in zip(sides, kept, strict=True)))
            for (index, sides), kept in zip(_trained_bases(nested, context).items(), ranks, strict=True)
        }


@dataclass(frozen=True)
class _Job:
    """What every process needs to train."""

    checkpoint: Checkpoint
    config: MatryoshkaConfig
    data: Calibration
    start: dict[int, tuple[LatentBasis, LatentBasis]]
    nominal: tuple[int, int]
    seed: int
    device: str
    dtype: str


def _train(job: _Job, state: StateFile | None = None, progress: Progress | None = None) -> tuple[Any, NestedBases]:
    """The frozen model and the trained bases."""
    import torch

    from kvcompress.training import distill, distributed, models, nested

    config, device = job.config, distributed.local_device(job.device)
    model = models.load_model(job.checkpoint, device, getattr(torch, job.dtype), models.ATTENTION)
    if config.recompute:
        models.save_activations(model)
    layers = sorted(job.start)
    sides = []
    for side in (0, 1):
        found = [job.start[index][side] for index in layers]
        mean, basis, inverse = (torch.stack([getattr(one, name) for one in found]) for name in _PARTS)
        sides.append(nested.NestedSide(mean, basis, inverse, train_mean=side == 1))
    bases = nested.NestedBases(layers, *sides).to(device)
    heads, head_dim = job.start[layers[0]][0].mean_HD.shape
    forward, kept = models.logits(model), torch.empty(0)

    def draw(step: int) -> None:
        nonlocal kept
        kept = nested.random_ranks(job.seed, step, len(layers), heads, head_dim, job.nominal, config.focus).to(device)

    def teacher(tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        models.set_round_trips(model, {})
        return forward(tokens_BT, positions_BT)

    def student(tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        models.set_round_trips(model, bases.round_trips(kept))
        return forward(tokens_BT, positions_BT)

    # Turning a kept channel into another kept one changes nothing: its gradient is rounding noise, not a direction.
    schedule = distill.Schedule(
        config.steps, config.batch, config.learning_rate, config.kl_weight, job.seed, epsilon=_EPSILON
    )
    distill.distill(
        teacher, student, bases.trained(), job.data, schedule, before_step=draw, state=state, progress=progress
    )
    return model, bases


def _trained_bases(nested: NestedBases, context: Context) -> dict[int, tuple[LatentBasis, LatentBasis]]:
    """Full-rank bases of every layer, each block of head_dim / 8 channels on its own principal axes."""
    import torch

    from kvcompress.training.nested import in_order

    k, v = nested.k.bases(), nested.v.bases()
    trained = {}
    for position, index in enumerate(nested.layers):
        statistics = context.statistics(index)
        sides = []
        for (mean, basis, inverse), moments in ((k, statistics.keys), (v, statistics.values)):
            # There is nothing to be learned about a head that never moves, but training moves its mean.
            moves_H1 = moments.covariance_HDD.flatten(1).any(-1)[:, None]
            mean_HD = torch.where(moves_H1, mean[position], moments.mean_HD)
            shift_HD = moments.mean_HD - mean_HD
            second_HDD = moments.covariance_HDD + shift_HD[..., :, None] * shift_HD[..., None, :]
            block = max(CHANNEL_GROUP, context.geometry.head_dim // 8)
            ordered = in_order(basis[position], inverse[position], second_HDD, block)
            sides.append(LatentBasis(mean_HD.float(), *(part.float().contiguous() for part in ordered)))
        trained[index] = (sides[0], sides[1])
    return trained


def _search(
    config: MatryoshkaConfig, context: Context, model: Any, nested: NestedBases, nominal: tuple[int, int]
) -> list[tuple[int, int]]:
    """(keys, values) ranks of each layer, which add up to the nominal ones. Done once, however often resumed."""
    import torch

    from kvcompress.training import distill, models
    from kvcompress.training.budget import by_side, greedy_ranks

    unit = f"{context.unit}:ranks"
    if context.work.done(unit):
        return [(k, v) for k, v in context.work.data(unit)]
    head_dim, layers = context.geometry.head_dim, len(nested.layers)
    step = CHANNEL_GROUP * max(1, round(head_dim / 8 / CHANNEL_GROUP))
    slots = [[(side, position) for position in range(layers)] for side in (0, 1)]
    if config.trade:
        budgets = [(slots[0] + slots[1], layers * sum(nominal))]
    else:
        budgets = [(slots[side], layers * nominal[side]) for side in (0, 1)]
    count = len(context.calibration.offsets_N)
    chosen = sorted({count * sample // SEARCH_SAMPLES for sample in range(SEARCH_SAMPLES)})
    tokens_BT, positions_BT = distill.batch(context.calibration, chosen, model.device)
    forward = models.logits(model)

    @torch.no_grad()
    def logits(round_trips: dict[int, models.RoundTrip]) -> Tensor:
        models.set_round_trips(model, round_trips)
        return forward(tokens_BT, positions_BT)

    target_BTV = logits({})

    def measure(ranks: Ranks) -> float:
        kept_SL = torch.tensor(by_side(ranks, layers), device=model.device).T
        student_BTV = logits(nested.round_trips(kept_SL[..., None].expand(-1, -1, context.geometry.num_kv_heads)))
        return float(distill.loss(target_BTV, student_BTV, tokens_BT, kl_weight=1.0))

    def progress(done: int, total: int) -> None:
        context.progress("searching ranks", done, total)

    found = by_side(greedy_ranks(head_dim, step, CHANNEL_GROUP, budgets, measure, progress), layers)
    context.work.commit(unit, {}, found)
    return found
