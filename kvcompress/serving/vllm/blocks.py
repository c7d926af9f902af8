"""Attention of a layer whose cache has the form `blocks`: complete blocks from pages, newer tokens from a ring.

`gear_cache` has the bookkeeping and why it holds, `codec.gear` the rule that says what a query sees.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvcompress.codec.blocks.codec import BlocksCodec
from kvcompress.codec.blocks.spec import BlocksSpec
from kvcompress.codec.contract import CacheCodec
from kvcompress.ops import gpu
from kvcompress.ops.blocks import attention as blocks
from kvcompress.ops.blocks import cuda as cuda_blocks
from kvcompress.ops.blocks import store as block_store
from kvcompress.ops.blocks.plan import BlocksPlan
from kvcompress.ops.heads import cuda, reference
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

    _block_plan: BlocksPlan | None = None
    ring: Ring | None = None

    def use_ring(self, ring: Ring) -> None:
        self.ring = ring

    def use_codec(self, codec: CacheCodec, longest: int) -> None:
        """Set the codec of this rank's KV heads, on the layer's device, for requests of up to `longest` tokens."""
        assert isinstance(codec, BlocksCodec)
        assert (codec.spec.num_kv_heads, codec.spec.head_dim) == (self.num_kv_heads, self.head_size)
        self._block_plan = BlocksPlan(codec)
        latents = longest * self.num_kv_heads * (codec.k.spec.rank + codec.v.spec.rank) * torch.float32.itemsize
        scores = max(reference.SCORE_BYTES, self.num_heads * longest * torch.float32.itemsize)
        # Codes, values of codes, residuals and latents live side by side; so do scores, masked ones and probabilities.
        self._workspace_bytes = 4 * latents + 3 * scores

    @property
    def on_kernels(self) -> bool:
        plan = self._block_plan
        assert plan is not None
        return gpu.kernels(plan.k_mean_HD.device) is not None and cuda_blocks.covered(plan, per_page=1)

    def _workspace(self, output: Tensor) -> int:
        plan = self._block_plan
        assert plan is not None
        kernels = cuda.workspace_bytes(plan.spec, output.shape[0], self.num_heads, output.device)
        return max(self._workspace_bytes, kernels)

    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, batch: CompressedMetadata, output: Tensor
    ) -> None:
        """Compress the blocks that this step completes, attend, then keep the step's newest tokens."""
        plan, ring = self._block_plan, self.ring
        assert plan is not None
        assert ring is not None
        spec = plan.spec
        per_page = kv_cache.shape[2] // spec.block
        pages_NHMB = kv_cache.view(kv_cache.shape[0], spec.num_kv_heads, per_page, spec.record_bytes)
        rings_NHXPD = ring.sides_NHXPD
        ring_R = compat.layer_metadata(ring.name).block_table[: batch.seq_lens.shape[0], 0]
        # All blocks before any attention: a prompt may begin with blocks that another request of this step completes.
        numbers = (batch.query_starts, batch.seq_lens)
        block_store.seal(pages_NHMB, rings_NHXPD, ring_R, plan, key, value, batch.block_table, *numbers)
        blocks.attend(
            output,
            query,
            key,
            value,
            pages_NHMB,
            rings_NHXPD,
            ring_R,
            plan,
            batch.block_table,
            *numbers,
            self.scale,
        )
        block_store.keep(rings_NHXPD, ring_R, key, value, *numbers)
