"""Attention layers as vLLM has built them: what they are, and what is put in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvcompress.serving.vllm.compat.attention import Backend, Implementation
from kvcompress.serving.vllm.compat.engine import Engine


@dataclass(frozen=True)
class Layer:
    """One attention layer on this rank."""

    name: str
    """In vLLM's books."""
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    sliding_window: int | None
    features: tuple[str, ...]
    """What it does beside ordinary causal attention, in words."""
    module: Any = field(repr=False, compare=False)
    """vLLM's own, to hand back to it."""

    @classmethod
    def of(cls, module: Any) -> Layer:
        """From any layer that `is_attention`, as soon as it asks for its quantization."""
        ordinary = isinstance(module, Attention)
        return cls(
            name=module.layer_name,
            num_heads=module.num_heads,
            num_kv_heads=module.num_kv_heads,
            head_size=module.head_size,
            scale=module.impl.scale if ordinary else module.scale,
            sliding_window=module.sliding_window,
            features=tuple(_features(module)) if ordinary else (f"is a {type(module).__name__} layer",),
            module=module,
        )

    @property
    def impl(self) -> Any:
        """What attends, now; None where vLLM has not decided yet."""
        return getattr(self.module, "impl", None)

    @property
    def cache(self) -> Tensor:
        """`[blocks, KV heads, tokens per block, content]`, once vLLM has bound it."""
        cache: Tensor = self.module.kv_cache
        return cache

    @property
    def captured(self) -> bool:
        """Whether steps may become CUDA graphs, where our own implementation attends."""
        return bool(self.module.attn_backend.builder.captured_queries)

    @property
    def device(self) -> torch.device:
        """Where vLLM has placed it; it owns no weights."""
        device: torch.device = self.module._k_scale.device
        return device


def _features(module: Any) -> Iterator[str]:
    # vLLM has built its own implementation of the layer by now; what it was asked to do is recorded there.
    stock = module.impl
    found = [
        (type(module) is not Attention, f"is a {type(module).__name__} layer"),
        (module.attn_type != AttentionType.DECODER, f"does {AttentionType(module.attn_type).value} attention"),
        (module.sliding_window is not None, f"attends a sliding window of {module.sliding_window} tokens"),
        (getattr(stock, "alibi_slopes", None) is not None or module.use_alibi_sqrt, "uses ALiBi position biases"),
        (bool(getattr(stock, "logits_soft_cap", None)), "caps its attention logits"),
        (module.has_sink, "has learned attention sinks"),
        (module.use_mm_prefix, "attends image tokens in both directions"),
        (module.kv_sharing_target_layer_name is not None, "shares another layer's cache"),
        (module.head_size_v != module.head_size, "has values of another size than keys"),
        (module.kv_cache_dtype != "auto", f"stores its cache as {module.kv_cache_dtype}"),
    ]
    return (reason for present, reason in found if present)


def is_attention(module: Any) -> bool:
    """Whether a layer has a cache."""
    return isinstance(module, Attention | MLAAttention)


def attach(layer: Layer, backend: type[Backend], impl: Implementation, cache_spec: Callable[[int], Any]) -> None:
    """Replace the attention backend, implementation and cache spec that vLLM has chosen for a layer.

    Args:
        cache_spec: from the tokens of a block, which may change between now and when vLLM asks.
    """
    layer.module.attn_backend = backend
    layer.module.backend = AttentionBackendEnum[backend.get_name()]
    layer.module.impl = impl
    layer.module.get_kv_cache_spec = lambda config: cache_spec(block_size_of(config))


def full_attention(block_size: int, num_kv_heads: int, head_size: int, content_bytes: int) -> FullAttentionSpec:
    """What the block manager is told about pages of `block_size` tokens, of each of which every head has so many bytes.

    vLLM sees a cache as `[blocks, heads, tokens, content bytes]`. Our records have no padding, so a record's size is
    tokens times a constant and fits that form without a spec class of our own: vLLM's full-attention spec with packed
    content. That keeps every rule of the block manager (layers of different size in one group, block sizes scaled or
    split for hybrid models, merging, pickling) in the one implementation vLLM tests.
    """
    spec = FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        dtype=torch.uint8,
        state_content_bytes=content_bytes,
    )
    assert spec.page_size_bytes == block_size * num_kv_heads * content_bytes
    return spec


def block_size_of(config: Any) -> int:
    """Tokens of a block, as vLLM has settled them by now."""
    return int(config.cache_config.block_size)


def add_cache_layer(engine: Engine, name: str, layer: AttentionLayerBase) -> None:
    """Enter a layer that owns a cache and computes nothing into vLLM's books.

    Raises:
        ValueError: there is one of that name.
    """
    layers = engine.config.compilation_config.static_forward_context
    if name in layers:
        raise ValueError(f"vLLM has two layers named {name}")
    layers[name] = layer


def attention_layers(engine: Engine) -> list[Layer]:
    """Every attention layer of this process, whether it has a codec or not."""
    modules = engine.config.compilation_config.static_forward_context.values()
    return [Layer.of(module) for module in modules if isinstance(module, Attention)]


def layer_metadata(name: str) -> Any:
    """The running step's attention metadata of the layer of a name."""
    metadata = get_forward_context().attn_metadata
    assert isinstance(metadata, dict), "limits refuses split batches"
    return metadata[name]


Answer = Callable[[Layer, Tensor, Tensor, Tensor], Tensor]
"""Layer, query, key and value to output."""


@contextmanager
def answered_by(layers: Sequence[Layer], answer: Answer) -> Iterator[None]:
    """Let a function stand in for the layers' own attention."""
    stock = [layer.impl for layer in layers]
    try:
        for layer in layers:
            layer.module.impl = _Answering(layer, answer)
        yield
    finally:
        for layer, impl in zip(layers, stock, strict=True):
            layer.module.impl = impl


class _Answering:
    """In the place of an attention implementation, which answers everything else."""

    def __init__(self, layer: Layer, answer: Answer) -> None:
        self._layer, self._answer, self._stock = layer, answer, layer.impl

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, cache: Any, metadata: Any, output: Tensor, **_: Any
    ) -> Tensor:
        return output.copy_(self._answer(self._layer, query, key, value))
