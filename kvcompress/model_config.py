"""config.json, checked and completed: what each key must be, and what it means where it is left out. Imports no torch.

Transformers and vLLM take a key that is missing from the default of the model's configuration class, so those defaults
are part of a model. They stand here, one table per family, because a plan must not wait for torch to be imported;
`tests/test_model_config.py` holds the tables against transformers' classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

LATENT_ARCHITECTURE = "KVCompressMLAForCausalLM"
"""What `transmla` makes of the others: multi-head latent attention."""


@dataclass(frozen=True)
class Family:
    """What one model class of transformers does with its config.json, and which tensors it has."""

    model_type: str
    defaults: Mapping[str, Any]
    """Of the keys that may be left out."""
    nullable: frozenset[str] = frozenset()
    """Keys that may be null, besides those that may be null in every family."""
    qkv_bias: bool | None = False
    """Of the query, key and value projections; None: where `attention_bias` says so."""
    o_bias: bool | None = False
    qk_norm: bool = False


_COMMON: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "tie_word_embeddings": False,
}
_LLAMA = {
    **_COMMON,
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
}
_MISTRAL = {
    **_COMMON,
    "vocab_size": 32000,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "head_dim": None,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN = {
    **_COMMON,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

FAMILIES = {
    "LlamaForCausalLM": Family(
        "llama", _LLAMA, frozenset({"num_key_value_heads", "head_dim"}), qkv_bias=None, o_bias=None
    ),
    "MistralForCausalLM": Family("mistral", _MISTRAL, frozenset({"head_dim"})),
    "Qwen2ForCausalLM": Family("qwen2", _QWEN, frozenset({"num_key_value_heads"}), qkv_bias=True),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        {**_QWEN, "head_dim": 128, "attention_bias": False},
        frozenset({"num_key_value_heads"}),
        qkv_bias=None,
        o_bias=None,
        qk_norm=True,
    ),
    # Written by us, with every key that matters.
    LATENT_ARCHITECTURE: Family("kvcompress_mla", _LLAMA),
}
SUPPORTED_ARCHITECTURES = tuple(name for name in FAMILIES if name != LATENT_ARCHITECTURE)

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
    hidden_act: Literal["silu"]  # vLLM's classes have no other
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
    rope: Rope

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]

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
        if self.architecture == "MistralForCausalLM":
            return (self.sliding_window,) * self.num_hidden_layers
        slides = [index >= self.max_window_layers for index in range(self.num_hidden_layers)]
        if self.layer_types:
            slides = [kind == SLIDING for kind in self.layer_types]
        return tuple(self.sliding_window if sliding else None for sliding in slides)


_KEYS = DecoderConfig.model_fields.keys() - {"architecture", "rope"}
_VLLM_ALONE: dict[str, dict[str, Any]] = {
    "llama": {"is_causal": True, "bias": False, "logit_scale": 1.0},
    "mistral": {"is_causal": True, "bias": False, "logit_scale": 1.0, "llama_4_scaling": None},
    "qwen2": {"is_causal": True, "qk_norm": False, "dual_chunk_attention_config": None},
    "qwen3": {"is_causal": True, "dual_chunk_attention_config": None},
}
"""Keys that vLLM's class of a model type reads and transformers' does not, and where they change nothing."""
_OF_SOME = ("attention_bias", "mlp_bias")
"""Keys that mean nothing in a family without them."""


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the keys that it leaves out, as its model class takes them.

    Raises:
        ValueError: unknown architecture, or a model_type that is not the architecture's.
    """
    family = FAMILIES[architecture_of(config)]
    found = config.get("model_type")
    if found != family.model_type:
        raise ValueError(
            f"config.json has model_type {found!r} and architecture {architecture_of(config)}; expected model_type "
            f"{family.model_type!r}, by which transformers chooses the model's class"
        )
    return {**family.defaults, **config}


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """Check a Hugging Face config.json.

    Raises:
        ValueError: an architecture we do not support, a key of the wrong type, or keys that contradict each other or
            mean different things to transformers and vLLM.
    """
    whole = completed(config)
    architecture = architecture_of(config)
    family = FAMILIES[architecture]
    for key in ("num_key_value_heads", "head_dim"):
        if key in whole and whole[key] is None and key not in family.nullable:
            raise ValueError(f"config.json has {key} null, which a {architecture} cannot read; remove the key")
    _check_biases(whole, architecture)
    _check_vllm_alone(whole, architecture)
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
            rope=_rope(whole, architecture),
            **{key: whole[key] for key in _KEYS if key in whole and (key in family.defaults or key not in _OF_SOME)},
        )
    except ValidationError as error:
        raise ValueError(_sentence(error)) from None
    _check_heads(parsed)
    return _without_unused_window(parsed)


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
    if name in FAMILIES:
        return name
    near = difflib.get_close_matches(name, SUPPORTED_ARCHITECTURES, n=1)
    # Names of other models' classes are alike, too; model_type tells them from slips.
    slip = near and config.get("model_type") in (None, FAMILIES[near[0]].model_type)
    hint = f"; did you mean {near[0]}?" if slip else ""
    raise ValueError(
        f"unknown architecture {name} in config.json; supported: {', '.join(SUPPORTED_ARCHITECTURES)}{hint}"
    )


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


def _rope(whole: Mapping[str, Any], architecture: str) -> Rope:
    given = rope_parameters(whole)
    nested = next((key for key, value in given.items() if isinstance(value, Mapping)), None)
    if nested is not None:
        raise ValueError(
            f"config.json has RoPE of its own for {nested}; a {architecture} has one for all layers: give its keys in "
            "rope_parameters"
        )
    kind = given["rope_type"]
    if not isinstance(kind, str) or kind not in _ROPE_NUMBERS:
        old = "; su is the old name of longrope, which transformers no longer reads" if kind == "su" else ""
        raise ValueError(f"config.json has RoPE of type {kind!r}; expected one of {', '.join(_ROPE_NUMBERS)}{old}")
    partial = given.get("partial_rotary_factor")
    if partial not in (None, 1.0):
        raise ValueError(
            f"config.json has partial_rotary_factor {partial!r}, which transformers and vLLM take to mean different "
            f"things in a {architecture}; remove it if the model rotates whole heads"
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


def _check_biases(whole: Mapping[str, Any], architecture: str) -> None:
    for key in _OF_SOME:
        if architecture == "MistralForCausalLM" and whole.get(key):
            raise ValueError(
                f"config.json has {key} {whole[key]!r}, which transformers does not read in a {architecture} and vLLM "
                "does; remove the key, or name the class that the model was trained as"
            )


def _check_vllm_alone(whole: Mapping[str, Any], architecture: str) -> None:
    same = dict(_VLLM_ALONE.get(whole["model_type"], {}))
    if "bias" in same:
        same["qkv_bias"] = whole.get("attention_bias", False)
    for key, neutral in same.items():
        value = whole.get(key, neutral)
        if value != neutral and (value or neutral):
            raise ValueError(
                f"config.json has {key} {_short(value)}, which transformers does not apply in a {architecture} "
                "and vLLM does; remove the key if the model can do without, or use another model"
            )


def _check_heads(config: DecoderConfig) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"config.json has {config.num_attention_heads} query heads and {config.num_key_value_heads} KV heads; "
            "query heads must be a multiple of KV heads"
        )
    if config.architecture == "LlamaForCausalLM" and config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"config.json has hidden_size {config.hidden_size} and {config.num_attention_heads} query heads; "
            "transformers loads a LlamaForCausalLM only where hidden_size is a multiple of the heads, head_dim or not"
        )


def _without_unused_window(config: DecoderConfig) -> DecoderConfig:
    """The config with its window only where the model's class applies it.

    Raises:
        ValueError: transformers and vLLM would apply different ones.
    """
    kinds, window, name = config.layer_types, config.sliding_window, config.architecture
    if name == LATENT_ARCHITECTURE:  # made from models without a window
        return config.model_copy(update={"sliding_window": None})
    if kinds is not None and len(kinds) != config.num_hidden_layers:
        raise ValueError(
            f"config.json has {len(kinds)} layer_types and {config.num_hidden_layers} layers; expected one per layer"
        )
    if name.startswith("Qwen"):
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
    if name == "LlamaForCausalLM" and kinds is not None:
        # vLLM windows the layers named here, and they keep their cache; transformers does not, which calibration bears.
        return config if window and SLIDING in kinds else config.model_copy(update={"sliding_window": None})
    if kinds is not None and SLIDING in kinds:
        raise ValueError(
            f"config.json has layers of sliding_attention in layer_types, which transformers does not read in a {name} "
            "and vLLM does; remove the key, or use an architecture with such layers"
        )
    if name == "MistralForCausalLM":
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
