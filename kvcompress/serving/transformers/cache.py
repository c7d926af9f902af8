"""A transformers cache that stores compressed bytes and hands attention the decoded keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvcompress.checkpoint import json_file
from kvcompress.checkpoint.source import resolve
from kvcompress.codec.blocks.codec import BlocksCodec
from kvcompress.codec.contract import CacheCodec
from kvcompress.codec.groups import check_groups
from kvcompress.codec.heads.codec import HeadsCodec
from kvcompress.codec.nested import WIDEST
from kvcompress.codec.prompt.codec import PromptCodec
from kvcompress.codec.shared.codec import SharedCodec
from kvcompress.serving.loading import load_codec
from kvcompress.serving.transformers.blocks import BlockLayer
from kvcompress.serving.transformers.complete import refuse_unread
from kvcompress.serving.transformers.groups import GroupLayer, PromptLayer, SharedLayer
from kvcompress.serving.transformers.records import from_records, to_records


class CompressedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's cache. `keys` and `values` hold records `uint8 [batch, heads, tokens, bytes]`, codes last.

    Tokens stay on dimension -2, so cropping, beam reordering and batch selection are the dynamic layer's own. Every
    token, the newest included, is attended in its stored form: results do not depend on how a prompt is cut up.
    """

    def __init__(self, codec: HeadsCodec) -> None:
        super().__init__()
        self.codec = codec

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.codec = self.codec.to(self.device)
        batch, heads = key_states.shape[:2]
        self.keys, self.values = (
            torch.empty(batch, heads, 0, side.spec.bytes_per_token, dtype=torch.uint8, device=self.device)
            for side in (self.codec.k, self.codec.v)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append post-RoPE states `[batch, heads, tokens, head_dim]`; return every token's decoded states."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, to_records(self.codec.k, key_states)], dim=-2)
        self.values = torch.cat([self.values, to_records(self.codec.v, value_states)], dim=-2)
        keys, values = from_records(self.codec.k, self.keys), from_records(self.codec.v, self.values)
        return keys.to(self.dtype), values.to(self.dtype)


class CompressedCache(Cache):  # type: ignore[misc]
    """A whole model's cache: compressed layers where the checkpoint has a codec, ordinary ones elsewhere."""

    def __init__(self, codecs: Sequence[CacheCodec | None]) -> None:
        check_groups([None if codec is None else codec.spec for codec in codecs])
        super().__init__(layers=_layers(codecs))

    @classmethod
    def from_pretrained(cls, model: str | Path, kv_rank: float = 1.0, kv_bits: int = WIDEST) -> CompressedCache:
        """An empty cache for a compressed checkpoint (a folder or a hub id).

        Args:
            kv_rank: share of the stored channels to keep; less memory, more loss.
            kv_bits: the most bits in which a channel is stored; likewise.

        Raises:
            ValueError: not a compressed checkpoint, a damaged one, or one that cannot be cut; or a model in memory
                whose weights transformers could not read, because it was loaded before this package was imported.
        """
        directory = resolve(str(model))
        codecs = load_codec(directory, kv_rank=kv_rank, kv_bits=kv_bits)
        refuse_unread(json_file.read_object(directory / "config.json"))
        return cls(codecs)

    @property
    def nbytes(self) -> int:
        """Bytes the cached tokens take now; what layers have in common counts once."""
        tensors: dict[int, Tensor] = {}
        blocks = 0
        for layer in self.layers:
            if isinstance(layer, BlockLayer):
                blocks += layer.nbytes if layer.is_initialized else 0
            elif layer.is_initialized:
                kept = layer.kept() if isinstance(layer, GroupLayer) else [layer.keys, layer.values]
                tensors |= {id(tensor): tensor for tensor in kept}
        return blocks + sum(tensor.nbytes for tensor in tensors.values())

    def scoring_steps(self, tokens: int, longest: int) -> list[int]:
        """Steps of up to `longest` tokens in which to feed a text so that its scores show what the cache costs.

        Caches that attend a step's own tokens as they are need short ones; one that factors the first step as the
        prompt is scored on what follows a prompt of half the text.
        """
        first, step = 0, longest
        for layer in self.layers:
            if isinstance(layer, GroupLayer):
                first, step = max(first, layer.scoring_prompt(tokens)), min(step, layer.scoring_step)
        sizes = [first] if first else []
        while (left := tokens - sum(sizes)) > 0:
            sizes.append(min(step, left))
        return sizes


def _layers(codecs: Sequence[CacheCodec | None]) -> list[DynamicLayer]:
    layers: list[DynamicLayer] = []
    groups: dict[tuple[int, ...], list[Any]] = {}
    for codec in codecs:
        if codec is None:
            layers.append(DynamicLayer())
        elif codec.spec.group is not None:
            members = groups.setdefault(codec.spec.group, [])
            if isinstance(codec, SharedCodec):
                layers.append(SharedLayer(codec, members))
            else:
                assert isinstance(codec, PromptCodec), f"no transformers cache for form {codec.spec.form}"
                layers.append(PromptLayer(codec, members))
        elif isinstance(codec, BlocksCodec):
            layers.append(BlockLayer(codec))
        else:
            assert isinstance(codec, HeadsCodec), f"no transformers cache for form {codec.spec.form}"
            layers.append(CompressedLayer(codec))
    return layers
