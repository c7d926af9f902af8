"""Attention of a layer whose cache has the form `blocks`: complete blocks from pages, newer tokens from a ring.

`gear_cache` has the bookkeeping and why it holds, `codec.gear` the rule that says what a query sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvcompress.codec.blocks.codec import BlocksCodec
from kvcompress.codec.blocks.spec import BlocksSpec
from kvcompress.ops.blocks.attention import bind
from kvcompress.ops.blocks.reference import BlocksOp
from kvcompress.serving.vllm import compat, limits
from kvcompress.serving.vllm.backend import (
    CompressedAttentionBackend,
    CompressedAttentionImpl,
    CompressedMetadata,
)
from kvcompress.serving.vllm.ring import Ring, block_cache_spec


class BlockAttentionBackend(CompressedAttentionBackend):
    """Names the parts, for pages of blocks of any size; `backend_of` makes the one for a codec."""

    @staticmethod
    def get_impl_cls() -> type[BlockAttentionImpl]:
        return BlockAttentionImpl

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[compat.KVCacheLayout, ...]:
        # Pages and rings differ in size; vLLM packs them into common blocks only if blocks are outermost.
        return (compat.KVCacheLayout.BLHNC,)


@cache
def backend_of(block: int) -> type[BlockAttentionBackend]:
    """The backend that makes vLLM choose a block size this codec can use, where the operator has chosen none."""

    def sizes(kv_cache_spec: Any = None) -> list[int | compat.MultipleOf]:
        return [compat.MultipleOf(block)]

    name = f"{BlockAttentionBackend.__name__}{block}"
    return type(name, (BlockAttentionBackend,), {"get_supported_kernel_block_sizes": staticmethod(sizes)})


def attach(layer: Any, name: str, spec: BlocksSpec, config: compat.VllmConfig, has_uncompressed_layers: bool) -> Ring:
    """Give an attention layer its implementation, its cache spec, and a ring beside it.

    Args:
        name: the layer's, in vLLM's books.
        spec: the codec of the KV heads this rank holds.

    Raises:
        ValueError: the engine has an option that this form does not serve.
    """
    limits.check_blocks(config, spec.block, has_uncompressed_layers)
    backend = backend_of(spec.block)
    # One more than a step with drafts can need (see gear_cache).
    tokens = spec.block + 1 + config.num_speculative_tokens
    ring = Ring(f"{name}.open_block", spec, tokens, config.model_config.dtype, backend)
    compat.add_cache_layer(config, ring.name, ring)
    impl = BlockAttentionImpl(layer.num_heads, layer.head_size, layer.impl.scale, layer.num_kv_heads)
    impl.use_ring(ring)
    # The block size may change between now and the call.
    compat.attach(layer, backend, impl, lambda now: block_cache_spec(spec, now.cache_config.block_size))
    return ring


class BlockAttentionImpl(CompressedAttentionImpl):
    """Attention of one layer, by the codec and the ring it is given."""

    _op: BlocksOp
    ring: Ring | None = None

    def use_ring(self, ring: Ring) -> None:
        self.ring = ring

    def _bind(self, codec: BlocksCodec, device: torch.device) -> BlocksOp:
        return bind(codec, device)

    def latents(self, kv_cache: Tensor, block_1: Tensor) -> Sequence[Tensor]:
        return self._op.read(self._pages(kv_cache), block_1)

    def _pages(self, kv_cache: Tensor) -> Tensor:
        """`[pages, KV heads, blocks per page, record_bytes]`."""
        pages_NHMB: Tensor = kv_cache.flatten(2).unflatten(2, (-1, self._op.plan.spec.record_bytes))
        return pages_NHMB

    def _workspace(self, output: Tensor) -> int:
        return self._op.workspace_bytes(output.shape[0], self.num_heads, self._longest)

    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, batch: CompressedMetadata, output: Tensor
    ) -> None:
        """Compress the blocks that this step completes, attend, then keep the step's newest tokens."""
        ring = self.ring
        assert ring is not None
        pages_NHMB, rings_NHXPD = self._pages(kv_cache), ring.sides_NHXPD
        ring_R = compat.layer_metadata(ring.name).block_table[: batch.seq_lens.shape[0], 0]
        # All blocks before any attention: a prompt may begin with blocks that another request of this step completes.
        caches, numbers = (pages_NHMB, rings_NHXPD, ring_R), (batch.query_starts, batch.seq_lens)
        self._op.seal(*caches, key, value, batch.block_table, *numbers)
        self._op.attend(output, query, key, value, *caches, batch.block_table, *numbers, self.scale)
        self._op.keep(rings_NHXPD, ring_R, key, value, *numbers)
