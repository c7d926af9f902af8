"""TransMLA: grouped-query attention becomes multi-head latent attention (Meng et al., 2025, arXiv 2502.07864 v5).

All KV heads' keys are seen as one vector k = W_K x in R^D, D = KV heads * head_dim, and all values as v = W_V x:

    merge       q_i . k_j(i) = (P_j(i)^T q_i) . k                   P_j selects head j; exact
    RoRoPE      k' = M^T k, M mixes pairs of one RoPE frequency     exact; energy moves to few pairs (`rorope`)
    partial     k' = [k_rope, k_nope]: RoPE on the rope_dim leading channels; the rest loses it
    balance     k_nope / r, r = mean norm of k_nope's channels / mean norm of v's
    low rank    c = R^T [k_nope / r, v], R the kv_lora_rank leading principal axes

A token's cache is [c, k_rope], served by `modeling.mla`. With rope_dim = D, no folding and kv_lora_rank = D nothing is
lost. Biases need no care: keys and values are linear in [x, 1]. Layers are converted in order, each on the outputs of
the converted ones before it.

Beyond the paper, each an option: pairs are mixed as complex numbers (`rotation: unitary`, still exact, more
concentrated), and what loses RoPE gets its mean rotation instead of none (`dropped_rope: mean`). The paper's own
choices are `orthogonal` and `none`. RoPE dims and folding are chosen by the error of the layers' outputs on the
calibration text (the official code chooses on a test split).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictFloat, StrictInt

from kvcompress.checkpoint.safetensors_file import TORCH_DTYPES, TensorInfo, TensorSpec
from kvcompress.codec.bands import CHANNEL_GROUP
from kvcompress.families import LATENT_ARCHITECTURE, Names, family_of
from kvcompress.geometry import ModelGeometry
from kvcompress.methods.base import Outline, TransformMethod
from kvcompress.model_config import completed, rope_parameters
from kvcompress.recipe import Kind, StageConfig

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompress.checkpoint.reader import Checkpoint
    from kvcompress.checkpoint.writer import Transform
    from kvcompress.methods.context import Context

ROPE_CANDIDATES = (64, 128)
"""RoPE dims tried by `rope_dim: auto`, with head_dim and twice head_dim; a half and a quarter where none has room."""

_ATTENTION = f"({Names().layer('(DIGITS)')}{Names().attention}.)".replace(".", r"\.").replace("DIGITS", r"\d+")
_PROJECTION = re.compile(_ATTENTION + r"(q|k|v)_proj\.(weight|bias)")
_LATENT = re.compile(_ATTENTION + r"(kv_a_proj|q_a_proj|q_b_proj|k_up|v_up)(?:\.(weight|bias))?")
_ATTENTION_ONLY = ("sliding_window", "layer_types", "use_sliding_window", "max_window_layers")

Channels = Annotated[StrictInt, Field(gt=0, multiple_of=CHANNEL_GROUP)]
Share = Annotated[StrictFloat, Field(gt=0.0, le=1.0)]


class TransMlaConfig(StageConfig):
    kind: ClassVar[Kind] = "attention"
    method: Literal["transmla"] = "transmla"
    kv_lora_rank: Channels | Share | Literal["auto"] = Field(
        "auto", description="channels of the latent: a count, a share of all keys and values, or auto (target_ratio)"
    )
    target_ratio: float = Field(
        2.0, ge=1.0, description="with kv_lora_rank auto: how many times smaller latent and rotary key are together"
    )
    rope_dim: Channels | Literal["auto"] = Field(
        "auto", description="key channels that keep RoPE; auto: chosen by the layers' output error on calibration text"
    )
    freqfold: Annotated[StrictInt, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="neighbouring RoPE frequencies mixed as one; auto: doubled from 1 while the error falls"
    )
    rotation: Literal["unitary", "orthogonal"] = Field("unitary", description="how pairs of one frequency are mixed")
    dropped_rope: Literal["mean", "none"] = Field(
        "mean", description="what replaces RoPE where it is dropped: its mean rotation, or nothing (the paper)"
    )
    whitening: Literal["activation", "none"] = Field(
        "activation", description="error the low rank minimises: of keys and values, or of the weights that make them"
    )
    balance: float = Field(1.0, gt=0.0, description="weight of keys against values in the low rank")
    q_lora_rank: Channels | None = Field(None, description="rank of the query projection; null keeps it as it is")


@dataclass(frozen=True)
class Choice:
    """What `auto` came to."""

    rope_dim: int
    rank: int
    freqfold: int


class TransMla(TransformMethod[TransMlaConfig]):
    name = "transmla"
    summary = "Grouped-query attention to multi-head latent attention: one latent and a small rotary key per token"
    paper = "TransMLA, arXiv 2502.07864; input-covariance whitening after CARE"
    config = TransMlaConfig

    def outline(self, config: TransMlaConfig, before: Outline) -> Outline:
        """As for every stage; where `rope_dim` is auto, v_up's size is that of the first candidate, the largest."""
        geometry = before.geometry
        _refuse(before, geometry)
        return _outline_of(config, before, geometry, candidates(config, geometry)[0])

    def transform(self, config: TransMlaConfig, before: Outline, context: Context) -> tuple[Transform, Outline]:
        from kvcompress.methods import transmla_layers

        choice = transmla_layers.choose(config, context, candidates(config, context.geometry))
        transmla_layers.convert(config, context, choice)
        return _Conversion(config, context, choice), _outline_of(config, before, context.geometry, choice)

    def restore(self, checkpoint: Checkpoint) -> tuple[Transform, dict[str, Any]]:
        """Plain keys and values of every head from the latent, with RoPE on all of them again."""
        return _Restoration(checkpoint), dict(checkpoint.config["base_config"])


def attention_prefix(layer: int) -> str:
    """Of the names of a layer's attention tensors, before the conversion and after it."""
    return f"{Names().layer(layer)}{Names().attention}."


def candidates(config: TransMlaConfig, geometry: ModelGeometry) -> list[Choice]:
    """What may be tried, smallest first: one rope_dim and freqfold each, all of one cache size.

    Raises:
        ValueError: sizes that the model does not have room for.
    """
    keys, half = geometry.num_kv_heads * geometry.head_dim, geometry.head_dim // 2
    if config.rope_dim == "auto" and config.kv_lora_rank != "auto":
        raise ValueError(
            "rope_dim auto needs kv_lora_rank auto and a target_ratio, so that the cache's size does not depend on "
            "data; give rope_dim as a number of channels"
        )
    if config.rope_dim == "auto":
        head = geometry.head_dim
        ropes = sorted({*ROPE_CANDIDATES, head, 2 * head})
        if _rank(config, keys, ropes[0]) <= 0:  # a small model or a high ratio: less than one head keeps RoPE
            ropes = [rope for rope in (head // 4, head // 2) if rope < ropes[0]]
    else:
        ropes = [config.rope_dim]
    found = []
    for rope in ropes:
        rank = _rank(config, keys, rope)
        if rope > keys or rope % 2 or not 0 < rank <= 2 * keys - rope:
            continue
        for fold in [2**i for i in range(half.bit_length())] if config.freqfold == "auto" else [config.freqfold]:
            if half % fold == 0 and rope * fold % geometry.head_dim == 0:
                found.append(Choice(rope, rank, fold))
    if not found:
        raise ValueError(
            f"found kv_lora_rank {config.kv_lora_rank}, rope_dim {config.rope_dim} and freqfold {config.freqfold}; the "
            f"model has {keys} key and {keys} value channels, of which rope_dim keys and at most {2 * keys} - rope_dim "
            f"latent channels can be kept, freqfold must divide {half}, and rope_dim * freqfold must be a multiple of "
            f"head_dim {geometry.head_dim}"
        )
    return found


def _rank(config: TransMlaConfig, keys: int, rope: int) -> int:
    """Channels of the latent; a ratio or a share is rounded to whole channel groups."""
    if config.kv_lora_rank == "auto":
        width = max(1, round(2 * keys / config.target_ratio / CHANNEL_GROUP)) * CHANNEL_GROUP
        # No fewer times smaller than asked: rounding never takes the ratio below the target.
        while width * config.target_ratio > 2 * keys:
            width -= CHANNEL_GROUP
        return width - rope
    if isinstance(config.kv_lora_rank, float):
        return min(
            max(CHANNEL_GROUP, round(config.kv_lora_rank * 2 * keys / CHANNEL_GROUP) * CHANNEL_GROUP), 2 * keys - rope
        )
    return config.kv_lora_rank


def frequencies(config: Mapping[str, Any], head_dim: int) -> list[float]:
    """The base model's RoPE: radians per token of each of its head_dim / 2 pairs.

    Raises:
        ValueError: a variant of RoPE that is not a fixed rotation per pair.
    """
    rope = rope_parameters(config)
    kind, base, partial = rope["rope_type"], float(rope["rope_theta"]), rope.get("partial_rotary_factor", 1.0)
    if kind not in ("default", "linear", "llama3") or partial != 1.0:
        name = f"{kind!r}" if partial == 1.0 else f"on {partial} of each head"
        raise ValueError(
            f"the model's RoPE is {name}; transmla moves rotations into fixed weights, which needs one frequency per "
            "pair of channels whatever the length: rope_type default, linear or llama3 on whole heads"
        )
    theta = [base ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if kind == "linear":
        return [value / float(rope["factor"]) for value in theta]
    return [_llama3(value, rope) for value in theta] if kind == "llama3" else theta


def _llama3(theta: float, rope: Mapping[str, Any]) -> float:
    """Llama 3.1's stretch of low frequencies, as transformers computes it."""
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = float(rope["original_max_position_embeddings"]) * theta / (2 * math.pi)
    if turns < low:
        return theta / factor
    if turns > high:
        return theta
    smooth = (turns - low) / (high - low)
    return (1 - smooth) * theta / factor + smooth * theta


def _refuse(before: Outline, geometry: ModelGeometry) -> None:
    if geometry.latent_dims is not None:
        raise ValueError("the model has multi-head latent attention already; transmla converts Llama, Mistral, Qwen2")
    family = family_of(before.config)
    if family.qk_norm:
        raise ValueError(
            f"{family.architecture} normalises queries and keys before RoPE (q_norm, k_norm): keys are not linear in "
            "the input, and heads cannot be merged; transmla converts Llama, Mistral and Qwen2 models"
        )
    if not family.like_llama:
        raise ValueError(
            f"{family.architecture} is no Llama but for its sizes, which converted checkpoints are; transmla converts "
            "Llama, Mistral and Qwen2 models"
        )
    if any(geometry.sliding_window):
        raise ValueError(
            f"layers of the model attend a sliding window of {max(filter(None, geometry.sliding_window))} tokens; "
            "transmla converts models with full attention in every layer"
        )
    frequencies(before.config, geometry.head_dim)
    keys = geometry.num_kv_heads * geometry.head_dim
    for index in range(geometry.num_layers):
        for side, rows in (("q", geometry.num_heads * geometry.head_dim), ("k", keys), ("v", keys)):
            name = f"{attention_prefix(index)}{side}_proj.weight"
            if before.tensors.get(name, ("", ()))[1] != (rows, geometry.hidden_size):
                raise ValueError(
                    f"{name} is not a {rows} x {geometry.hidden_size} matrix; transmla needs the attention projections "
                    "whole: leave them out of the weights stage before it"
                )


def _sizes(choice: Choice, base: Mapping[str, Any], geometry: ModelGeometry) -> dict[str, Any]:
    """What config.json says of the choice."""
    theta, dim, fold = frequencies(base, geometry.head_dim), choice.rope_dim, choice.freqfold
    return {
        "kv_lora_rank": choice.rank,
        "qk_rope_head_dim": dim,
        "rope_frequencies": kept_frequencies(theta, dim, geometry.head_dim, fold),
    }


def kept_frequencies(theta: Sequence[float], rope_dim: int, head_dim: int, fold: int) -> list[float]:
    """Frequencies of the rotary key's pairs: as many of each group of `fold`, evenly spread over it.

    With fewer pairs than frequencies in a group, every (fold / pairs)-th stays, highest first, as in the paper.
    """
    pairs = rope_dim * fold // head_dim
    within = [m * fold // pairs if pairs < fold else m % fold for m in range(pairs)]
    return [theta[group * fold + offset] for group in range(len(theta) // fold) for offset in within]


def _outline_of(config: TransMlaConfig, before: Outline, geometry: ModelGeometry, choice: Choice) -> Outline:
    """The checkpoint after the stage, had it come to this choice."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, (dtype, shape) in before.tensors.items():
        made = _replacement(name, dtype, shape, choice, config, geometry)
        for spec in [TensorSpec(name, dtype, shape)] if made is None else made:
            tensors[spec.name] = (spec.dtype, spec.shape)
    return Outline(_config(config, before, geometry, choice), tensors)


def _config(config: TransMlaConfig, before: Outline, geometry: ModelGeometry, choice: Choice) -> dict[str, Any]:
    """config.json after the stage."""
    base = completed(before.config)
    kept = {key: value for key, value in base.items() if key not in _ATTENTION_ONLY}
    first = attention_prefix(0)
    return {
        **kept,
        "architectures": [LATENT_ARCHITECTURE],
        "model_type": "kvcompress_mla",
        "num_key_value_heads": geometry.num_kv_heads,
        "head_dim": geometry.head_dim,
        **_sizes(choice, base, geometry),
        "q_lora_rank": config.q_lora_rank,
        "softmax_scale": geometry.head_dim**-0.5,
        "qkv_bias": f"{first}k_proj.bias" in before.tensors,
        "o_bias": f"{first}o_proj.bias" in before.tensors,
        "dropped_rope_context": geometry.context if config.dropped_rope == "mean" else None,
        "base_config": dict(before.config),
    }


def _replacement(
    name: str, dtype: str, shape: tuple[int, ...], choice: Choice, config: TransMlaConfig, geometry: ModelGeometry
) -> list[TensorSpec] | None:
    """The tensors in place of one of the base model's; None where it stays."""
    found = _PROJECTION.fullmatch(name)
    if found is None:
        return None
    prefix, side, kind = found[1], found[3], found[4]
    width, heads = choice.rank + choice.rope_dim, (geometry.num_kv_heads, geometry.head_dim)
    if side == "k":
        return [TensorSpec(f"{prefix}kv_a_proj.{kind}", dtype, (width, *shape[1:]))]
    if side == "v":
        ups = [
            TensorSpec(f"{prefix}k_up", dtype, (*heads, width)),
            TensorSpec(f"{prefix}v_up", dtype, (*heads, choice.rank)),
        ]
        return ups if kind == "weight" else []
    if config.q_lora_rank is None:
        return None
    low = TensorSpec(f"{prefix}q_a_proj.{kind}", dtype, (config.q_lora_rank, *shape[1:]))
    return [low] if kind == "bias" else [low, TensorSpec(f"{prefix}q_b_proj.weight", dtype, (shape[0], low.shape[0]))]


class _Conversion:
    """Writes the converted layers' tensors where the base model's were."""

    def __init__(self, config: TransMlaConfig, context: Context, choice: Choice) -> None:
        self.config, self.context, self.choice = config, context, choice

    def plan(self, info: TensorInfo) -> Sequence[TensorSpec] | None:
        return _replacement(info.name, info.dtype, info.shape, self.choice, self.config, self.context.geometry)

    def apply(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        from kvcompress.checkpoint.safetensors_file import load_tensors
        from kvcompress.methods import transmla_layers

        found = _PROJECTION.fullmatch(name)
        assert found is not None
        made = load_tensors(self.context.scratch(transmla_layers.file_of(int(found[2]))))
        info = self.context.checkpoint.tensors[name]
        for spec in self.plan(info) or ():
            yield spec.name, made[spec.name.removeprefix(found[1])]


class _Restoration:
    """Inverse of `_Conversion`: base-model tensors from the latent's."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.geometry = ModelGeometry.from_config(checkpoint.config["base_config"])

    def plan(self, info: TensorInfo) -> Sequence[TensorSpec] | None:
        found = _LATENT.fullmatch(info.name)
        if found is None:
            return None
        prefix, part, kind, rest = found[1], found[3], found[4], info.shape[1:]
        heads, head_dim = self.geometry.num_kv_heads, self.geometry.head_dim
        if part == "kv_a_proj":
            rows = (heads * head_dim, *rest)
            return [TensorSpec(f"{prefix}{side}_proj.{kind}", info.dtype, rows) for side in "kv"]
        if part == "q_a_proj":
            return [TensorSpec(f"{prefix}q_proj.{kind}", info.dtype, (self.geometry.num_heads * head_dim, *rest))]
        return []

    def apply(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        from kvcompress.methods import transmla_layers

        info = self.checkpoint.tensors[name]
        found = _LATENT.fullmatch(name)
        planned = self.plan(info)
        assert found is not None
        if planned:
            made = transmla_layers.restored(self.checkpoint, found[1], found[3], tensor.double(), self.geometry)
            dtype = TORCH_DTYPES[info.dtype]
            for spec, value in zip(planned, made, strict=True):
                yield spec.name, transmla_layers.stored(value, dtype)
