"""A transformers cache that stores compressed bytes and hands attention the decoded keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kvcompress.checkpoint import json_file
from kvcompress.checkpoint.source import resolve
from kvcompress.codec.contract import CacheCodec
from kvcompress.codec.groups import check_groups
from kvcompress.codec.nested import WIDEST
from kvcompress.forms import FORMS
from kvcompress.serving.loading import load_codec
from kvcompress.serving.transformers.complete import refuse_unread
from kvcompress.serving.transformers.layer import CompressedLayer


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
        kept = [
            layer.kept() if isinstance(layer, CompressedLayer) else [layer.keys, layer.values]
            for layer in self.layers
            if layer.is_initialized
        ]
        return sum({id(tensor): tensor.nbytes for of_layer in kept for tensor in of_layer}.values())

    def scoring_steps(self, tokens: int, longest: int) -> list[int]:
        """Steps of up to `longest` tokens in which to feed a text so that its scores show what the cache costs.

        Caches that attend a step's own tokens as they are need short ones; one that factors the first step as the
        prompt is scored on what follows a prompt of half the text.
        """
        first, step = 0, longest
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                first, step = max(first, layer.scoring_prompt(tokens)), min(step, layer.scoring_step)
        sizes = [first] if first else []
        while (left := tokens - sum(sizes)) > 0:
            sizes.append(min(step, left))
        return sizes


def prepare(model: PreTrainedModel, cache: Cache) -> None:
    """Let a model attend a cache whose layers want more than attention of keys and values; most want nothing."""
    for layer in cache.layers:
        if isinstance(layer, CompressedLayer):
            layer.prepare(model)


def _layers(codecs: Sequence[CacheCodec | None]) -> list[DynamicLayer]:
    layers: list[DynamicLayer] = []
    members: dict[tuple[int, ...], list[Any]] = {}
    for index, codec in enumerate(codecs):
        if codec is None:
            layers.append(DynamicLayer())
        else:
            group = members.setdefault(codec.spec.group or (index,), [])
            layers.append(FORMS[codec.spec.form].cache_layer(codec, group))
    return layers
