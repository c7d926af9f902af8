"""The sizes of a model's attention: layers, heads, windows, and the bytes of its cache. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvcompress.model_config import DecoderConfig, parse

SERVED_BYTES = 2
"""Bytes of a number in an uncompressed cache. vLLM serves in 16 bits whatever the checkpoint is stored in, as long as
nobody asks for --dtype float32, so that is what a compressed cache is compared with."""


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
    context: int
    """Tokens the model is made for, RoPE scaling included."""
    vocab_size: int
    sliding_window: tuple[int | None, ...]
    latent_dims: tuple[int, ...] | None = None

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    def kv_bytes_per_token(self, element_bytes: int = SERVED_BYTES) -> int:
        """Bytes one token takes in an uncompressed cache of this model, all layers, keys and values."""
        return sum(self.layer_kv_bytes_per_token(index, element_bytes) for index in range(self.num_layers))

    def layer_kv_bytes_per_token(self, index: int, element_bytes: int = SERVED_BYTES) -> int:
        """The same for one layer."""
        heads = 2 * self.num_kv_heads * self.head_dim
        channels = heads if self.latent_dims is None else self.latent_dims[index]
        return channels * element_bytes

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelGeometry:
        """Read a Hugging Face config.json.

        Raises:
            ValueError: as `model_config.parse` and `of`.
        """
        return cls.of(parse(config))

    @classmethod
    def of(cls, found: DecoderConfig) -> ModelGeometry:
        """The sizes of a parsed config.json.

        Raises:
            ValueError: heads of a size that does not fit our records.
        """
        if found.head_dim % 8:
            raise ValueError(
                f"head_dim is {found.head_dim}; kvcompress packs channels in groups of 8 and needs a multiple of 8"
            )
        return cls(
            architecture=found.architecture,
            num_layers=found.num_hidden_layers,
            hidden_size=found.hidden_size,
            vocab_size=found.vocab_size,
            num_heads=found.num_attention_heads,
            num_kv_heads=found.num_key_value_heads,
            head_dim=found.head_dim,
            context=found.context,
            sliding_window=found.windows,
            latent_dims=found.latent_dims,
        )
