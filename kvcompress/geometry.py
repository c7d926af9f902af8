"""What a model's config.json says about its attention: layers, heads, windows. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
LATENT_ARCHITECTURE = "KVCompressMLAForCausalLM"
"""What `transmla` makes of the others: multi-head latent attention."""

BYTES_PER_ELEMENT = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class ModelGeometry:
    """Sizes of a decoder-only model with rotary attention.

    `sliding_window` has one entry per layer: the window in tokens, or None for full attention. With multi-head latent
    attention, `latent_dims` has the channels a token's cache takes in each layer: latent and rotary key, shared by all
    heads; heads and head_dim are then those that the up-projections make.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    dtype: str
    sliding_window: tuple[int | None, ...]
    latent_dims: tuple[int, ...] | None = None

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def element_bytes(self) -> int:
        return BYTES_PER_ELEMENT[self.dtype]

    def kv_bytes_per_token(self, element_bytes: int | None = None) -> int:
        """Bytes one token takes in an uncompressed cache of this model, all layers, keys and values."""
        return sum(self.layer_kv_bytes_per_token(index, element_bytes) for index in range(self.num_layers))

    def layer_kv_bytes_per_token(self, index: int, element_bytes: int | None = None) -> int:
        """The same for one layer."""
        heads = 2 * self.num_kv_heads * self.head_dim
        channels = heads if self.latent_dims is None else self.latent_dims[index]
        return channels * (element_bytes or self.element_bytes)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelGeometry:
        """Read a Hugging Face config.json.

        Raises:
            ValueError: architecture we do not support, latent attention of another kind than ours, or sizes that do
                not fit together.
        """
        architecture = _architecture(config)
        try:
            num_layers = int(config["num_hidden_layers"])
            hidden_size = int(config["hidden_size"])
            num_heads = int(config["num_attention_heads"])
        except KeyError as missing:
            raise ValueError(f"config.json has no {missing}, which a {architecture} needs; is it complete?") from None
        num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
        head_dim = int(config.get("head_dim") or hidden_size // num_heads)
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"config.json has {num_heads} query heads and {num_kv_heads} KV heads; "
                "query heads must be a multiple of KV heads"
            )
        if head_dim % 8:
            raise ValueError(
                f"head_dim is {head_dim}; kvcompress packs channels in groups of 8 and needs a multiple of 8"
            )
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        if dtype not in BYTES_PER_ELEMENT:
            raise ValueError(f"config.json has dtype {dtype!r}; expected one of {', '.join(BYTES_PER_ELEMENT)}")
        return cls(
            architecture=architecture,
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=int(config.get("max_position_embeddings") or 2048),
            dtype=dtype,
            sliding_window=_windows(config, architecture, num_layers),
            latent_dims=_latent_dims(config, num_layers) if architecture == LATENT_ARCHITECTURE else None,
        )


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


def _architecture(config: Mapping[str, Any]) -> str:
    if (config.get("architectures") or [None])[0] == LATENT_ARCHITECTURE:
        return LATENT_ARCHITECTURE
    if config.get("kv_lora_rank"):
        raise ValueError(
            "the model already uses multi-head latent attention (config.json has kv_lora_rank); "
            "latent base models are not supported yet"
        )
    names = config.get("architectures") or []
    name = str(names[0]) if names else "(none)"
    if name in SUPPORTED_ARCHITECTURES:
        return name
    near = difflib.get_close_matches(name, SUPPORTED_ARCHITECTURES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"unknown architecture {name} in config.json; supported: {', '.join(SUPPORTED_ARCHITECTURES)}{hint}"
    )


def _windows(config: Mapping[str, Any], architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """Window per layer. Mistral windows every layer; Qwen windows those its layer_types or max_window_layers name."""
    window = config.get("sliding_window")
    if not window:
        return (None,) * num_layers
    layer_types = config.get("layer_types")
    if layer_types:
        return tuple(int(window) if kind == "sliding_attention" else None for kind in layer_types)
    if architecture == "MistralForCausalLM":
        return (int(window),) * num_layers
    if not config.get("use_sliding_window"):
        return (None,) * num_layers
    first = int(config.get("max_window_layers", num_layers))
    return tuple(int(window) if index >= first else None for index in range(num_layers))
