"""Form `heads` in vLLM.

One forward call stores the step's tokens and then attends to all tokens in their stored form, the new ones included,
so a result depends neither on how a prompt is chunked nor on prefix hits, preemption or rejected drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcompress.codec.heads.codec import HeadsCodec
from kvcompress.codec.heads.layout import PageLayout
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.codec.layout import CHUNK_TOKENS, FRAGMENT
from kvcompress.codec.spec import CodecSpec
from kvcompress.ops import cuda_library
from kvcompress.ops.heads import cuda
from kvcompress.ops.heads.attention import bind, order
from kvcompress.ops.heads.reference import HeadsOp
from kvcompress.serving.vllm import compat
from kvcompress.serving.vllm.metadata import DeviceBuilder, HostBuilder, Step


def check(engine: compat.Engine, codec: CodecSpec) -> None:
    """Nothing: what pages of this form need depends on who reads them (`backend_for`)."""


def attach(layer: compat.Layer, codec: HeadsCodec, engine: compat.Engine, members: list[Any]) -> None:
    """Give an attention layer its implementation and its cache spec.

    Raises:
        ValueError: the operator has chosen a block size that the CUDA kernels cannot read.
    """
    spec, backend = codec.spec, backend_for(codec.spec, engine)
    impl = backend.implementation(layer.num_heads, layer.head_size, layer.scale, layer.num_kv_heads)
    compat.attach(layer, backend, impl, lambda block_size: cache_spec(spec, block_size))


def backend_for(layer: HeadsSpec, engine: compat.Engine) -> type[HeadsBackend]:
    """The backend of a layer with this codec: the one place where the order of bytes in its pages is decided.

    Raises:
        ValueError: the operator has chosen a block size that the CUDA kernels cannot read.
    """
    if order(layer, engine.device) != FRAGMENT:
        return HeadsBackend
    # vLLM itself chooses one that they can.
    if engine.block_size_chosen and not cuda.covers_blocks(engine.block_size):
        raise ValueError(_unreadable(engine.block_size))
    return DeviceHeadsBackend


def cache_spec(layer: HeadsSpec, block_size: int) -> compat.FullAttentionSpec:
    """The cache spec of one layer on this rank.

    Raises:
        ValueError: block_size is not a positive multiple of 16.
    """
    layout = PageLayout.of(layer, block_size)
    content = layer.k.bytes_per_token + layer.v.bytes_per_token
    spec = compat.full_attention(block_size, layer.num_kv_heads, layer.head_dim, content)
    assert spec.page_size_bytes == layout.page_bytes
    return spec


class HeadsImpl(compat.Implementation):
    """Attention of one layer, by the codec it is given."""

    op: HeadsOp

    def use_codec(self, codec: HeadsCodec, device: torch.device, longest: int) -> None:
        """Bind the codec of this rank's KV heads to the layer's device, for requests of up to `longest` tokens."""
        assert (codec.spec.num_kv_heads, codec.spec.head_dim) == (self.num_kv_heads, self.head_size)
        self.op, self._longest = bind(codec, device), longest

    def run(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, step: Step, output: Tensor) -> None:
        pages_NHX = kv_cache.flatten(2)
        self.op.append(pages_NHX, key, value, step.slot_mapping[: key.shape[0]])
        for part in step.parts:
            self.op.attend(part.call(step, query, output, self.scale), pages_NHX)

    def workspace_bytes(self, output: Tensor) -> int:
        return self.op.workspace_bytes(output.shape[0], self.num_heads, self._longest, output.dtype)

    def latents(self, kv_cache: Tensor, block_1: Tensor) -> Sequence[Tensor]:
        return self.op.read(kv_cache.flatten(2), block_1, kv_cache.shape[2])


class DeviceHeadsImpl(HeadsImpl):
    """The same where the CUDA kernels attend."""

    def run(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, step: Step, output: Tensor) -> None:
        # The block size that counts is the allocated cache's: vLLM may scale or split blocks after asking for specs.
        if not cuda.covers_blocks(kv_cache.shape[2]):
            raise ValueError(_unreadable(kv_cache.shape[2]))
        super().run(query, key, value, kv_cache, step, output)


class HeadsBackend(compat.Backend):
    name = "KVCOMPRESS"
    implementation, builder = HeadsImpl, HostBuilder


class DeviceHeadsBackend(HeadsBackend):
    """Pages in fragment order, numbers left on the device."""

    name = "KVCOMPRESS_CUDA"
    implementation, builder = DeviceHeadsImpl, DeviceBuilder
    # A power of two of them is needed, and seen to above.
    block_multiple = CHUNK_TOKENS


def _unreadable(block_size: int) -> str:
    return (
        f"found --block-size {block_size}; the CUDA kernels read pages of {CHUNK_TOKENS} tokens times a power of two; "
        f"use {CHUNK_TOKENS}, or leave the option out; {cuda_library.PATH_VARIABLE}= (empty) serves with torch code "
        "instead"
    )
