"""config.json, checked and completed: what each key must be, and what it means where it is left out. Imports no torch.

What differs between models stands in `kvcompress.families`; `tests/test_model_config.py` holds it against transformers.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvcompress.families import FAMILIES, LATENT_ARCHITECTURE, Family, family_of, supported

Count = Annotated[int, Field(ge=1, lt=2**31)]
MOST_LAYERS = 4096
"""More than any model has; lists of as many entries as a damaged file says would fill the memory."""
SLIDING = "sliding_attention"

CHANGING_ROPE = ("dynamic", "longrope")
"""RoPE types whose frequencies depend on the length of the text."""

_ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""RoPE types we know, and the numbers each one needs."""


class Rope(BaseModel):
    """Rotary embedding: its type, base, and the type's own numbers."""

    model_config = ConfigDict(strict=True, frozen=True)
    kind: str
    theta: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0


class DecoderConfig(BaseModel):
    """The keys of config.json that anything here reads, of the type they must have, defaults filled in."""

    model_config = ConfigDict(strict=True, frozen=True)

    architecture: str
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    max_position_embeddings: Annotated[int, Field(ge=2, lt=2**31)]
    hidden_act: str
    rms_norm_eps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    use_cache: bool
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: Annotated[int, Field(ge=0)] | None = None
    use_sliding_window: bool = False
    max_window_layers: Annotated[int, Field(ge=0)] = 0
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    num_experts: Count = 1
    expert_size: Count = 1
    expert_step: Count = 1
    layers_without_experts: list[int] = []
    latent_dims: tuple[int, ...] | None = None
    """Of our latent attention: channels a token's cache takes in each layer."""
    rope: Rope

    @property
    def family(self) -> Family:
        return family_of({"architectures": [self.architecture]})

    @property
    def expert_layers(self) -> set[int]:
        """Decoder layers that have experts in place of one MLP."""
        layers = range(self.expert_step - 1, self.num_hidden_layers, self.expert_step) if self.family.experts else ()
        return set(layers) - set(self.layers_without_experts)

    @property
    def context(self) -> int:
        """Tokens the model is made for: stretched by linear and dynamic RoPE; all others count the stretch already."""
        stretch = self.rope.factor if self.rope.kind in ("linear", "dynamic") else 1.0
        return int(self.max_position_embeddings * stretch)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of every layer in tokens, None for full attention."""
        if not self.sliding_window:
            return (None,) * self.num_hidden_layers
        if self.family.windows == "in_all" or (self.family.windows == "as_named" and not self.layer_types):
            return (self.sliding_window,) * self.num_hidden_layers
        slides = [index >= self.max_window_layers for index in range(self.num_hidden_layers)]
        if self.layer_types:
            slides = [kind == SLIDING for kind in self.layer_types]
        return tuple(self.sliding_window if sliding else None for sliding in slides)


_OF_EXPERTS = ("num_experts", "expert_size", "expert_step", "layers_without_experts")
_KEYS = DecoderConfig.model_fields.keys() - {"architecture", "rope", "latent_dims", *_OF_EXPERTS}
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
_OF_SOME = ("attention_bias", "mlp_bias")
"""Keys that mean nothing in a family without them."""


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the keys that it leaves out, as its model class takes them.

    Raises:
        ValueError: unknown architecture, or a model_type that is not the architecture's.
    """
    architecture_of(config)
    family = family_of(config)
    found = config.get("model_type")
    if family.model_type not in (None, found):
        raise ValueError(
            f"config.json has model_type {found!r} and architecture {architecture_of(config)}; expected model_type "
            f"{family.model_type!r}, by which transformers chooses the model's class"
        )
    inner = config.get(family.text_config) if family.text_config else None
    return {**family.defaults, **config, **(inner if isinstance(inner, Mapping) else {})}


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Check a Hugging Face config.json.

    Raises:
        ValueError: an architecture we do not support, a key of the wrong type, or keys that contradict each other or
            mean different things to transformers and vLLM.
    """
    whole = completed(config)
    family = family_of(config)
    architecture = family.architecture
    missing = next((key for key in _SIZES if key not in whole), None)
    if missing is not None:
        raise unknown(
            architecture, config.get("model_type"), f"; it cannot be tried, because config.json has no {missing}"
        )
    for key in ("num_key_value_heads", "head_dim"):
        if key in whole and whole[key] is None and key not in family.nullable:
            raise ValueError(f"config.json has {key} null, which a {architecture} cannot read; remove the key")
    if family.activation not in (None, whole["hidden_act"]):
        raise ValueError(f"config.json has hidden_act {_short(whole['hidden_act'])}; expected {family.activation!r}")
    _check_unread(whole, family)
    _check_vllm_alone(whole, family)
    if "torch_dtype" in whole and whole.get("dtype") is None:
        whole["dtype"] = whole["torch_dtype"]
    if isinstance(whole.get("dtype"), str):
        whole["dtype"] = whole["dtype"].removeprefix("torch.")
    if whole.get("num_key_value_heads") is None:
        whole["num_key_value_heads"] = whole["num_attention_heads"]
    if whole.get("head_dim") is None:
        whole["head_dim"] = _head_dim(whole)
    try:
        parsed = DecoderConfig(
            architecture=architecture,
            rope=_rope(whole, family),
            **{key: whole[key] for key in _KEYS if key in whole and (key in family.defaults or key not in _OF_SOME)},
            **_experts(whole, family),
        )
    except ValidationError as error:
        raise ValueError(_sentence(error)) from None
    _check_heads(parsed)
    if architecture == LATENT_ARCHITECTURE:
        parsed = parsed.model_copy(update={"latent_dims": _latent_dims(config, parsed.num_hidden_layers)})
    return _without_unused_window(parsed)


def _latent_dims(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    try:
        rank, rope_dim = config["kv_lora_rank"], int(config["qk_rope_head_dim"])
    except KeyError as missing:
        raise ValueError(
            f"config.json has no {missing}, which a {LATENT_ARCHITECTURE} needs; is it complete?"
        ) from None
    ranks = [int(each) for each in rank] if isinstance(rank, list) else [int(rank)] * num_layers
    if len(ranks) != num_layers:
        raise ValueError(f"config.json has {len(ranks)} latent ranks for {num_layers} layers; expected one per layer")
    return tuple(each + rope_dim for each in ranks)


def architecture_of(config: Mapping[str, Any]) -> str:
    """The model class that config.json names.

    Raises:
        ValueError: none, or one that we do not support.
    """
    names = config.get("architectures")
    if names is not None and (not isinstance(names, list) or not all(isinstance(name, str) for name in names)):
        raise ValueError(f"config.json has architectures {names!r}; expected a list with the name of the model's class")
    name = names[0] if names else "(none)"
    if name != LATENT_ARCHITECTURE and config.get("kv_lora_rank"):
        raise ValueError(
            "the model already uses multi-head latent attention (config.json has kv_lora_rank); "
            "latent base models are not supported yet"
        )
    model_type = config.get("model_type")
    taken = any(model_type == family.model_type for family in FAMILIES.values())
    if name in FAMILIES or (name.endswith("ForCausalLM") and isinstance(model_type, str) and not taken):
        return name
    raise unknown(name, model_type)


def unknown(name: str, model_type: object, why: str = "") -> ValueError:
    """The refusal of an architecture that we do not know, with a reason where it was tried."""
    near = difflib.get_close_matches(name, supported(), n=1)
    # Names of other models' classes are alike, too; model_type tells them from slips.
    slip = near and model_type in (None, FAMILIES[near[0]].model_type)
    hint = f"; did you mean {near[0]}?" if slip else ""
    return ValueError(f"unknown architecture {name} in config.json; supported: {', '.join(supported())}{hint}{why}")


def _head_dim(whole: Mapping[str, Any]) -> Any:
    """hidden_size shared out among heads; whatever was found where that is no division of numbers."""
    hidden, heads = whole["hidden_size"], whole["num_attention_heads"]
    if not all(type(value) is int and value > 0 for value in (hidden, heads)):
        return 8  # their own fields will be complained about
    return hidden // heads


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of rotary embedding, in today's keys: `rope_type`, `rope_theta` and those of the type.

    Older files have `rope_scaling` and `rope_theta` apart; where both are there, transformers takes `rope_scaling`.

    Raises:
        ValueError: it is no object.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if config.get(key) is not None and not isinstance(config[key], Mapping):
            raise ValueError(f"config.json has {key} {config[key]!r}; expected an object or null")
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    outside = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config}
    return {"rope_theta": 10000.0, "rope_type": given.get("type", "default"), **outside, **given}


def _experts(whole: Mapping[str, Any], family: Family) -> dict[str, Any]:
    experts = family.experts
    if experts is None:
        return {}
    keys: tuple[tuple[str | None, ...], ...] = (experts.count, (experts.size,), (experts.step,), (experts.dense,))
    given = {
        ours: [whole[key] for key in theirs if key and key in whole]
        for ours, theirs in zip(_OF_EXPERTS, keys, strict=True)
    }
    return {ours: values[0] for ours, values in given.items() if values}


def _rope(whole: Mapping[str, Any], family: Family) -> Rope:
    given = rope_parameters(whole)
    nested = next((key for key, value in given.items() if isinstance(value, Mapping)), None)
    if nested is not None:
        raise ValueError(
            f"config.json has RoPE of its own for {nested}; a {family.architecture} has one for all layers: give its "
            "keys in rope_parameters"
        )
    kind = given["rope_type"]
    if not isinstance(kind, str) or kind not in _ROPE_NUMBERS:
        old = "; su is the old name of longrope, which transformers no longer reads" if kind == "su" else ""
        raise ValueError(f"config.json has RoPE of type {kind!r}; expected one of {', '.join(_ROPE_NUMBERS)}{old}")
    partial = given.get("partial_rotary_factor")
    if partial not in (None, 1.0) and not family.partial_rotary:
        raise ValueError(
            f"config.json has partial_rotary_factor {partial!r}, which transformers and vLLM take to mean different "
            f"things in a {family.architecture}; remove it if the model rotates whole heads"
        )
    for key in _ROPE_NUMBERS[kind]:
        value = given.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**62:
            found = "no" if key not in given else f"{value!r} as"
            raise ValueError(f"config.json has {found} {key} of its {kind} RoPE; expected a number above 0")
    low, high = given.get("low_freq_factor", 0), given.get("high_freq_factor", 1)
    if kind == "llama3" and low >= high:
        raise ValueError(
            f"config.json has low_freq_factor {low} and high_freq_factor {high} of its llama3 RoPE; expected the first "
            "to be the smaller one"
        )
    factor = given["factor"] if "factor" in _ROPE_NUMBERS[kind] else 1.0
    try:
        return Rope(kind=kind, theta=given["rope_theta"], factor=factor)
    except ValidationError as error:
        raise ValueError(_sentence(error, {"theta": "rope_theta"})) from None


def _check_unread(whole: Mapping[str, Any], family: Family) -> None:
    for key in _OF_SOME:
        if key in family.unread and whole.get(key):
            raise ValueError(
                f"config.json has {key} {whole[key]!r}, which transformers does not read in a {family.architecture} "
                "and vLLM does; remove the key, or name the class that the model was trained as"
            )


def _check_vllm_alone(whole: Mapping[str, Any], family: Family) -> None:
    same = dict(family.neutral)
    if "bias" in same:
        same["qkv_bias"] = whole.get("attention_bias", False)
    for key, neutral in same.items():
        value = whole.get(key, neutral)
        if value != neutral and (value or neutral):
            raise ValueError(
                f"config.json has {key} {_short(value)}, which transformers does not apply in a "
                f"{family.architecture} and vLLM does; remove the key if the model can do without, or use another model"
            )


def _check_heads(config: DecoderConfig) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"config.json has {config.num_attention_heads} query heads and {config.num_key_value_heads} KV heads; "
            "query heads must be a multiple of KV heads"
        )
    if config.family.whole_heads and config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"config.json has hidden_size {config.hidden_size} and {config.num_attention_heads} query heads; "
            f"transformers loads a {config.architecture} only where hidden_size is a multiple of the heads, whatever "
            "head_dim is"
        )


def _without_unused_window(config: DecoderConfig) -> DecoderConfig:
    """The config with its window only where the model's class applies it.

    Raises:
        ValueError: transformers and vLLM would apply different ones.
    """
    kinds, window, name = config.layer_types, config.sliding_window, config.architecture
    rule = config.family.windows
    if rule == "dropped":
        return config.model_copy(update={"sliding_window": None})
    if kinds is not None and len(kinds) != config.num_hidden_layers:
        raise ValueError(
            f"config.json has {len(kinds)} layer_types and {config.num_hidden_layers} layers; expected one per layer"
        )
    if rule == "as_named":
        return config
    if rule == "opt_in":
        if not config.use_sliding_window:
            if kinds and SLIDING in kinds:
                raise ValueError(
                    "config.json has layers of sliding_attention in layer_types and use_sliding_window is not true; "
                    "set it to true, or make every layer full_attention"
                )
            return config.model_copy(update={"sliding_window": None})
        if not window:
            return config.model_copy(update={"sliding_window": None, "layer_types": None})
        return config
    if rule == "by_layer" and kinds is not None:
        # vLLM windows the layers named here, and they keep their cache; transformers does not, which calibration bears.
        return config if window and SLIDING in kinds else config.model_copy(update={"sliding_window": None})
    if kinds is not None and SLIDING in kinds:
        raise ValueError(
            f"config.json has layers of sliding_attention in layer_types, which transformers does not read in a {name} "
            "and vLLM does; remove the key, or use an architecture with such layers"
        )
    if rule == "in_all":
        if window == 0:
            raise ValueError(
                "config.json has sliding_window 0, in which transformers attends to nothing; set it to null for full "
                "attention"
            )
        return config
    if window:
        raise ValueError(
            f"config.json has sliding_window {window}, which transformers does not apply in a {name} and vLLM does; "
            "remove the key if the model was trained with full attention"
        )
    return config


def _sentence(error: ValidationError, names: Mapping[str, str] | None = None) -> str:
    """The first mistake that pydantic found, in one sentence."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    name = (names or {}).get(key, key)
    value = first["input"]
    message = first["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"config.json has {name} {_short(value)}; expected {message}"


def _short(value: Any) -> str:
    found = "null" if value is None else repr(value)
    return found if len(found) <= 80 else found[:77] + "..."
