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

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, StrictInt, StrictStr, model_validator

from kvcompress.calibration import MAX_STATE_TOKENS
from kvcompress.codec.bands import CHANNEL_GROUP
from kvcompress.codec.groups import Share
from kvcompress.codec.prompt.spec import PromptSpec
from kvcompress.codec.spec import CacheSpec
from kvcompress.geometry import SERVED_BYTES, ModelGeometry
from kvcompress.methods.base import LayerBases, ModelBasis, Needs, Profile, channels
from kvcompress.methods.group_fit import Fitted, States, fit_side, once
from kvcompress.methods.pca import Pca, PcaConfig, RankPair
from kvcompress.methods.shared import Membership, SharedProfile
from kvcompress.recipe import Kind, StageConfig

if TYPE_CHECKING:
    from kvcompress.codec.prompt.codec import PromptCodec
    from kvcompress.methods.context import Context


def _group(value: int | str) -> int | str:
    if value != "auto" and (isinstance(value, str) or value < 1):
        raise ValueError("expected a number of layers from 1, or auto")
    return value


Group = Annotated[StrictInt | StrictStr, AfterValidator(_group)]


class XkvConfig(StageConfig):
    kind: ClassVar[Kind] = "basis"
    method: Literal["xkv"] = "xkv"
    basis: Literal["calibrated", "prompt"] = Field(
        "calibrated", description="where the basis comes from: calibration text, or each prompt (transformers only)"
    )
    group: Group = Field(4, description="neighbouring layers that share a latent, or auto: as many as max_error allows")
    max_error: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="auto: allowed relative error, in the metric, of a group's keys and of its values",
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
            for group in _fixed_groups(1 if isinstance(config.group, str) else config.group, layers)
            for place in range(len(group))
        ]

    def own_specs(self, config: XkvConfig, geometry: ModelGeometry, layers: Sequence[int]) -> list[CacheSpec] | None:
        if config.basis == "calibrated":
            return None
        assert isinstance(config.group, int)
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
                SERVED_BYTES,
                config.sink,
                config.recent,
            )
            for group in _fixed_groups(config.group, layers)
            for place in range(len(group))
        ]

    def own_codecs(self, config: XkvConfig, context: Context, specs: Sequence[CacheSpec]) -> list[PromptCodec]:
        from kvcompress.codec.prompt.codec import PromptCodec
        from kvcompress.codec.rope import Rope

        rope = Rope.of(context.model_config()) if config.share == "kv" else None
        return [PromptCodec(spec, rope) for spec in specs if isinstance(spec, PromptSpec)]

    def fit_model(self, config: XkvConfig, context: Context, profiles: Sequence[Profile]) -> dict[int, LayerBases]:
        from kvcompress.codec.rope import Rope

        states = {side: States(context, side, config.metric, config.center, config.sink) for side in ("k", "v")}
        rope = Rope.of(context.model_config()) if config.share == "kv" else None
        ranks = {"k": profiles[0].k_rank, "v": profiles[0].v_rank}
        bases: dict[int, LayerBases] = {}
        for group in _groups(config, context, states, ranks):

            def fit(group: tuple[int, ...] = group) -> Fitted:
                values = fit_side(states["v"], group, _stripe(config, ranks["v"], len(group)))
                if config.share == "kv":
                    return fit_side(states["k"], group, _stripe(config, ranks["k"], len(group))), values
                pca = PcaConfig(metric=config.metric)
                return [Pca().fit(pca, context.statistics(index))[0].cut(ranks["k"]) for index in group], values

            context.progress("fitting layers", len(bases), len(context.compressed_layers))
            members = [_member(config, group, place) for place in range(len(group))]
            bases |= once(context, group, members, rope, fit)
        return bases

    def fit_bytes(self, config: XkvConfig, geometry: ModelGeometry, tokens: int) -> tuple[int, int]:
        if config.basis == "prompt":
            return 0, 0
        width, tokens = geometry.num_kv_heads * geometry.head_dim, min(tokens, MAX_STATE_TOKENS)
        layers = config.max_group if isinstance(config.group, str) else config.group
        # A moment of all layers of a group, its eigenvectors and the solver's copy; two layers' states and one more.
        memory = 8 * (4 * (layers * width) ** 2 + 4 * tokens * width)
        return memory, 2 * 4 * tokens * width * geometry.num_layers


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


def _groups(
    config: XkvConfig, context: Context, states: Mapping[str, States], ranks: Mapping[str, int]
) -> list[tuple[int, ...]]:
    if isinstance(config.group, int):
        return _fixed_groups(config.group, context.compressed_layers)
    from kvcompress.calibration.grouping import group_layers

    assert config.max_error is not None
    sides = {side: ranks[side] for side in ("k", "v") if side == "v" or config.share == "kv"}
    unit = f"{context.unit}-groups"
    if not context.work.done(unit):
        found = group_layers(
            context.compressed_layers,
            lambda index: {side: states[side](index) for side in sides},
            sides,
            config.max_error,
            config.max_group,
        )
        context.work.commit(unit, {}, {"groups": found})
    return [tuple(group) for group in context.work.data(unit)["groups"]]
