"""xKV: neighbouring layers share one latent per token, because their caches lie in nearly the same subspace.

With M = [M_1 | ... | M_W] the states of a group's W layers side by side (tokens x channels, all KV heads; values, and
keys before RoPE), the truncated SVD M ~ U_r S_r V_r^T is the best latent of r channels for all of them (Chang et al.,
2025, arXiv 2503.18893). Two forms:

    calibrated    V is found on calibration text and lies in the checkpoint: latent = sum over layers of
                  (x_l - mean_l) S_l V_l, x_l ~ mean_l + latent V_l^T S_l^-1, with S_l the root of the metric
    prompt        the paper's: the SVD of each prompt's own cache, once it has been read; transformers only

Every layer stores an equal stripe of the latent. With a number for `group`, `rank` is per layer: a latent has W times
as many channels, and larger groups lose less in the same bytes. With `group: auto`, `rank` is the latent's, however
many layers share it: neighbours join, and save bytes, while the error of the group's states stays within `max_error`
by a bound that holds on the calibration tokens (Shamrai 2026, arXiv 2601.11626; `calibration.grouping`).

A step attends its own tokens as they are, earlier ones as stored, so results depend on how a prompt is cut into steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, StrictInt, field_validator, model_validator

from kvcompress.codec.shared_spec import PromptSpec, Share
from kvcompress.codec.spec import CHANNEL_GROUP, CacheSpec
from kvcompress.geometry import ModelGeometry
from kvcompress.methods.base import LatentBasis, LayerBases, ModelBasis, Needs, Profile, channels
from kvcompress.methods.pca import Pca, PcaConfig, RankPair
from kvcompress.methods.shared import (
    Membership,
    SharedBases,
    SharedBasis,
    SharedProfile,
    metric_roots,
    shared_bases,
)
from kvcompress.recipe import Kind, StageConfig

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.calibration.states import LayerStates
    from kvcompress.codec.prompt import PromptCodec
    from kvcompress.methods.context import Context

_STATE_TOKENS = 16384


class XkvConfig(StageConfig):
    kind: ClassVar[Kind] = "basis"
    method: Literal["xkv"] = "xkv"
    basis: Literal["calibrated", "prompt"] = Field(
        "calibrated", description="where the basis comes from: calibration text, or each prompt (transformers only)"
    )
    group: Annotated[StrictInt, Field(ge=1)] | Literal["auto"] = Field(
        4, description="neighbouring layers that share a latent, or auto: as many as max_error allows"
    )
    max_error: float | None = Field(
        None, gt=0.0, lt=1.0, description="auto: allowed relative error of a group's keys and of its values"
    )
    max_group: int = Field(8, ge=1, description="auto: layers in a group at most")
    rank: RankPair = Field(
        RankPair(k=0.5, v=0.75),
        description="channels per layer (auto: per group): a share of num_kv_heads x head_dim (0.5) or a count",
    )
    share: Share = Field("kv", description="what a group shares: keys and values, or values only")
    metric: Literal["attention", "none"] = Field(
        "attention", description="error to minimise: attention's, or that of K and V"
    )
    center: bool = Field(True, description="calibrated: subtract each layer's mean first")
    sink: int = Field(0, ge=0, description="first tokens kept as they are (transformers only)")
    recent: int = Field(0, ge=0, description="newest tokens kept as they are (transformers only)")

    @field_validator("rank", mode="before")
    @classmethod
    def _same_for_both(cls, rank: object) -> object:
        return rank if isinstance(rank, (dict, RankPair)) else {"k": rank, "v": rank}

    @model_validator(mode="after")
    def _options_belong_together(self) -> XkvConfig:
        if (self.group == "auto") != (self.max_error is not None):
            raise ValueError("group: auto and max_error go together; give both or neither")
        if self.basis == "prompt" and self.group == "auto":
            raise ValueError("group: auto needs calibration text; with basis: prompt give a number of layers")
        return self


class Xkv(ModelBasis[XkvConfig]):
    name = "xkv"
    summary = "One latent per token for a group of layers, of keys before RoPE and of values"
    paper = "xKV, arXiv 2503.18893; groups after Concatenated Matrix SVD, arXiv 2601.11626"
    config = XkvConfig

    def needs(self, config: XkvConfig) -> Needs:
        if config.basis == "prompt":
            return "nothing"
        return "states" if config.share == "kv" else "values"

    def profiles(self, config: XkvConfig, geometry: ModelGeometry, layers: Sequence[int]) -> list[Profile]:
        ranks = _ranks(config, geometry)
        # With auto nobody shares: what a layer takes at most.
        return [
            SharedProfile(ranks["k"], ranks["v"], member=_member(config, group, place))
            for group in _fixed_groups(1 if config.group == "auto" else config.group, layers)
            for place in range(len(group))
        ]

    def own_specs(self, config: XkvConfig, geometry: ModelGeometry, layers: Sequence[int]) -> list[CacheSpec] | None:
        if config.basis == "calibrated":
            return None
        assert config.group != "auto"
        width = geometry.num_kv_heads * geometry.head_dim
        ranks = {side: channels(getattr(config.rank, side), width) for side in ("k", "v")}
        return [
            PromptSpec(
                geometry.num_kv_heads,
                geometry.head_dim,
                group,
                place,
                config.share,
                ranks["k"] if config.share == "kv" else 0,
                ranks["v"],
                geometry.element_bytes,
                config.sink,
                config.recent,
            )
            for group in _fixed_groups(config.group, layers)
            for place in range(len(group))
        ]

    def own_codecs(self, config: XkvConfig, context: Context) -> list[PromptCodec]:
        from kvcompress.codec.prompt import PromptCodec
        from kvcompress.codec.rope import Rope

        rope = Rope.of(context.model_config()) if config.share == "kv" else None
        specs = self.own_specs(config, context.geometry, context.compressed_layers)
        return [PromptCodec(spec, rope) for spec in specs or [] if isinstance(spec, PromptSpec)]

    def fit_model(self, config: XkvConfig, context: Context) -> dict[int, LayerBases]:
        bases: dict[int, LayerBases] = {}
        for group in self._groups(config, context):
            context.progress("fitting layers", len(bases), len(context.compressed_layers))
            bases |= _fit_group(config, context, group)
        return bases

    def fit_bytes(self, config: XkvConfig, geometry: ModelGeometry, tokens: int) -> tuple[int, int]:
        if config.basis == "prompt":
            return 0, 0
        width, tokens = geometry.num_kv_heads * geometry.head_dim, min(tokens, _STATE_TOKENS)
        layers = config.max_group if config.group == "auto" else config.group
        # A moment of all layers of a group, its eigenvectors and the solver's copy; two layers' states and one more.
        memory = 8 * (4 * (layers * width) ** 2 + 4 * tokens * width)
        return memory, 2 * 4 * tokens * width * geometry.num_layers

    def _groups(self, config: XkvConfig, context: Context) -> list[tuple[int, ...]]:
        if config.group != "auto":
            return _fixed_groups(config.group, context.compressed_layers)
        from kvcompress.calibration.grouping import group_layers

        assert config.max_error is not None
        ranks = _ranks(config, context.geometry)
        sides = {side: ranks[side] for side in ("k", "v") if side == "v" or config.share == "kv"}

        def blocks(index: int) -> dict[str, Tensor]:
            states = context.states(index).after(config.sink)
            return {side: _centred(config, _side(states, side))[1] for side in sides}

        return group_layers(list(context.compressed_layers), blocks, sides, config.max_error, config.max_group)


def _ranks(config: XkvConfig, geometry: ModelGeometry) -> dict[str, int]:
    """`rank` in channels; for keys that are not shared, per head."""
    width = geometry.num_kv_heads * geometry.head_dim
    ranks = {side: channels(getattr(config.rank, side), width) for side in ("k", "v")}
    if config.share == "v":
        share = config.rank.k
        ranks["k"] = channels(
            share if isinstance(share, float) else -(-share // geometry.num_kv_heads), geometry.head_dim
        )
    return ranks


def _stripe(config: XkvConfig, rank: int, layers: int) -> int:
    """Channels that each layer of a group stores of a latent whose rank is per layer, or with auto per group."""
    per_layer = -(-rank // layers) if config.group == "auto" else rank
    return -(-per_layer // CHANNEL_GROUP) * CHANNEL_GROUP


def _fixed_groups(size: int, layers: Sequence[int]) -> list[tuple[int, ...]]:
    """Neighbours in `layers`; the last group may be short."""
    return [tuple(layers[start : start + size]) for start in range(0, len(layers), size)]


def _member(config: XkvConfig, group: tuple[int, ...], place: int) -> Membership:
    return Membership(group, place, config.share, config.sink, config.recent)


def _side(states: LayerStates, side: str) -> Tensor:
    """One side's states `[tokens, heads, head_dim]`."""
    found = states.values_THD if side == "v" else states.keys_THD
    assert found is not None, "keys were not captured"
    return found


def _centred(config: XkvConfig, x_THD: Tensor) -> tuple[Tensor, Tensor]:
    """(mean_HD, states less the mean as tokens x channels), float64."""
    x = x_THD.double()
    mean_HD = x.mean(0) if config.center else x.new_zeros(x.shape[1:])
    return mean_HD, (x - mean_HD).flatten(1)


def _fit_group(config: XkvConfig, context: Context, group: tuple[int, ...]) -> dict[int, LayerBases]:
    from kvcompress.codec.rope import Rope

    ranks = _ranks(config, context.geometry)
    values = _fit_side(config, context, group, "v", _stripe(config, ranks["v"], len(group)))
    if config.share == "kv":
        rope = Rope.of(context.model_config())
        stripe = _stripe(config, ranks["k"], len(group))
        keys: Sequence[LatentBasis] = _fit_side(config, context, group, "k", stripe)
    else:
        rope, pca = None, PcaConfig(metric=config.metric)
        keys = [Pca().fit(pca, context.statistics(index))[0].cut(ranks["k"]) for index in group]
    return {
        index: SharedBases(keys[place], values[place], member=_member(config, group, place), rope=rope)
        for place, index in enumerate(group)
    }


def _fit_side(config: XkvConfig, context: Context, group: tuple[int, ...], side: str, rank: int) -> list[SharedBasis]:
    """Every layer's part in the truncated SVD of the group's states, in the metric asked for."""
    from kvcompress.calibration.joint import joint_axes

    means: dict[int, Tensor] = {}

    def states(index: int) -> Tensor:
        means[index], centred_TX = _centred(config, _side(context.states(index).after(config.sink), side))
        return centred_TX

    roots = [metric_roots(context.statistics(index), side, config.metric) for index in group]
    axes_WXR, variance_R = joint_axes(
        group, lambda index: states(index) @ roots[group.index(index)][0], len(group) * rank
    )
    return shared_bases([means[index] for index in group], roots, axes_WXR, variance_R)
