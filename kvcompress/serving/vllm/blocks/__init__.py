"""Form `blocks` in vLLM: complete blocks from pages, newer tokens from a ring.

`ring` has the bookkeeping and why it holds, `codec.blocks` the rule that says what a query sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvcompress.codec.blocks.codec import BlocksCodec
from kvcompress.codec.blocks.spec import BlocksSpec
from kvcompress.codec.spec import CodecSpec
from kvcompress.ops.blocks.attention import bind
from kvcompress.ops.blocks.reference import BlocksOp
from kvcompress.ops.call import Call
from kvcompress.serving.vllm import compat
from kvcompress.serving.vllm.blocks.ring import Ring
from kvcompress.serving.vllm.metadata import HostBuilder, Step


def check(engine: compat.Engine, codec: CodecSpec) -> None:
    """Refuse engine options that a cache of this form lacks.

    Raises:
        ValueError: naming the option.
    """
    for layer in codec.layers:
        if layer is not None and layer.form == BlocksSpec.form and engine.block_size_chosen:
            _check_pages(layer, engine.block_size)
    if not engine.hybrid_manager:
        raise ValueError(
            "found --disable-hybrid-kv-cache-manager; the codec keeps each request's newest tokens in a cache group of "
            "its own; leave the option out"
        )
    if engine.transfers_cache:
        raise ValueError(
            "found --kv-transfer-config; the newest tokens of a request, which the codec keeps uncompressed, are not "
            "transferred; leave the option out or compress with another encoding"
        )
    if None in codec.layers and engine.device.type == "cpu":
        raise ValueError(
            "the codec compresses blocks of tokens and leaves some layers uncompressed; vLLM's CPU backend cannot hold "
            "such caches side by side; serve on a GPU or compress with another encoding"
        )


def attach(layer: compat.Layer, codec: BlocksCodec, engine: compat.Engine, members: list[Any]) -> None:
    """Give an attention layer its implementation, its cache spec, and a ring beside it."""
    spec, backend = codec.spec, backend_of(codec.spec.block)
    # One more than a step with drafts can need (see `ring`).
    tokens = spec.block + 1 + engine.speculative_tokens
    ring = Ring(f"{layer.name}.open_block", spec, tokens, engine.dtype, backend)
    compat.add_cache_layer(engine, ring.name, ring)
    impl = BlocksImpl(ring, layer.num_heads, layer.head_size, layer.scale, layer.num_kv_heads)
    compat.attach(layer, backend, impl, lambda block_size: cache_spec(spec, block_size))


def cache_spec(layer: BlocksSpec, block_size: int) -> compat.FullAttentionSpec:
    """The cache spec of one layer's complete blocks on this rank.

    Raises:
        ValueError: block_size is not a multiple of the codec's block.
    """
    _check_pages(layer, block_size)
    return compat.full_attention(block_size, layer.num_kv_heads, layer.head_dim, layer.record_bytes // layer.block)


def _check_pages(layer: Any, block_size: int) -> None:
    if block_size % layer.block:
        raise ValueError(
            f"found --block-size {block_size}; the codec compresses {layer.block} tokens at a time; use a multiple of "
            f"that, such as {-(-block_size // layer.block) * layer.block}"
        )


class BlocksImpl(compat.Implementation):
    """Attention of one layer, by the codec and the ring it is given."""

    op: BlocksOp

    def __init__(self, ring: Ring, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.ring = ring

    def use_codec(self, codec: BlocksCodec, device: torch.device, longest: int) -> None:
        """Bind the codec of this rank's KV heads to the layer's device, for requests of up to `longest` tokens."""
        assert (codec.spec.num_kv_heads, codec.spec.head_dim) == (self.num_kv_heads, self.head_size)
        self.op, self._longest, self._record_bytes = bind(codec, device), longest, codec.spec.record_bytes

    def run(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, step: Step, output: Tensor) -> None:
        """Compress the blocks that this step completes, attend, then keep the step's newest tokens."""
        rings_NHXPD = self.ring.sides_NHXPD
        ring_R = compat.layer_metadata(self.ring.name).block_table[: step.seq_lens.shape[0], 0]
        call = Call(output, query, step.block_table, step.query_starts, step.seq_lens, self.scale)
        caches = (self._pages(kv_cache), rings_NHXPD, ring_R)
        # All blocks before any attention: a prompt may begin with blocks that another request of this step completes.
        self.op.seal(call, key, value, *caches)
        self.op.attend(call, key, value, *caches)
        self.op.keep(call, key, value, rings_NHXPD, ring_R)

    def workspace_bytes(self, output: Tensor) -> int:
        return self.op.workspace_bytes(output.shape[0], self.num_heads, self._longest)

    def latents(self, kv_cache: Tensor, block_1: Tensor) -> Sequence[Tensor]:
        return self.op.read(self._pages(kv_cache), block_1)

    def _pages(self, kv_cache: Tensor) -> Tensor:
        """`[pages, KV heads, blocks per page, record_bytes]`."""
        pages_NHMB: Tensor = kv_cache.flatten(2).unflatten(2, (-1, self._record_bytes))
        return pages_NHMB


class BlocksBackend(compat.Backend):
    """For blocks of any size; `backend_of` makes the one for a codec."""

    name = "KVCOMPRESS_BLOCKS"
    implementation, builder = BlocksImpl, HostBuilder
    beside_others = True


@cache
def backend_of(block: int) -> type[BlocksBackend]:
    """The backend that makes vLLM choose a block size this codec can use, where the operator has chosen none."""
    return type(f"{BlocksBackend.__name__}{block}", (BlocksBackend,), {"block_multiple": block})
