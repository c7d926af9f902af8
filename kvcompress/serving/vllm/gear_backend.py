"""Attention of a layer whose cache has the form `blocks`: complete blocks from pages, newer tokens from a ring.

`gear_cache` has the bookkeeping and why it holds, `codec.gear` the rule that says what a query sees.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvcompress.codec.forms import CacheCodec
from kvcompress.codec.gear import BlockCodec, attend
from kvcompress.codec.gear_spec import BlockSpec
from kvcompress.ops import reference
from kvcompress.serving.vllm import compat, limits
from kvcompress.serving.vllm.backend import (
    CompressedAttentionBackend,
    CompressedAttentionImpl,
    CompressedMetadata,
)
from kvcompress.serving.vllm.gear_cache import Ring, block_cache_spec


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


def attach(layer: Any, name: str, spec: BlockSpec, config: compat.VllmConfig, has_uncompressed_layers: bool) -> Ring:
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

    _codec: BlockCodec | None = None
    ring: Ring | None = None

    def use_ring(self, ring: Ring) -> None:
        self.ring = ring

    def use_codec(self, codec: CacheCodec, longest: int) -> None:
        """Set the codec of this rank's KV heads, on the layer's device, for requests of up to `longest` tokens."""
        assert isinstance(codec, BlockCodec)
        assert (codec.spec.num_kv_heads, codec.spec.head_dim) == (self.num_kv_heads, self.head_size)
        self._codec = codec
        latents = longest * self.num_kv_heads * (codec.k.spec.rank + codec.v.spec.rank) * torch.float32.itemsize
        scores = max(reference.SCORE_BYTES, self.num_heads * longest * torch.float32.itemsize)
        # Codes, values of codes, residuals and latents live side by side; so do scores, masked ones and probabilities.
        self._workspace_bytes = 4 * latents + 3 * scores

    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, batch: CompressedMetadata, output: Tensor
    ) -> None:
        """Store this step's keys and values, compress the blocks that became complete, then attend."""
        codec, ring = self._codec, self.ring
        assert codec is not None
        assert ring is not None
        spec = codec.spec
        per_page = kv_cache.shape[2] // spec.block
        pages_NHMB = kv_cache.view(kv_cache.shape[0], spec.num_kv_heads, per_page, spec.record_bytes)
        rings = compat.layer_metadata(ring.name).block_table[:, 0].tolist()
        starts, lengths = batch.query_starts.tolist(), batch.seq_lens.tolist()
        running = []
        for request, length in enumerate(lengths):
            tokens = slice(starts[request], starts[request + 1])
            if tokens.start == tokens.stop:
                continue
            blocks = torch.arange(length // spec.block, device=kv_cache.device)
            place = (batch.block_table[request].long()[blocks // per_page], blocks % per_page)
            places_HXPD = ring.sides_NHXPD[rings[request]]
            exact_THD, exact_start = self._newest(codec, places_HXPD, key[tokens], value[tokens], length)
            self._seal(codec, pages_NHMB, place, exact_THD, exact_start // spec.block)
            self._keep(places_HXPD, key[tokens], value[tokens], length)
            running.append((tokens, place, exact_THD, exact_start))
        # Not before all blocks are written: a prompt may begin with blocks that another request of this step completes.
        for tokens, place, exact_THD, exact_start in running:
            latents_THR = codec.open(pages_NHMB[place[0], :, place[1]])
            self._attend(codec, query[tokens], latents_THR, exact_THD, exact_start, output[tokens])

    def _newest(
        self, codec: BlockCodec, places_HXPD: Tensor, key_THD: Tensor, value_THD: Tensor, length: int
    ) -> tuple[tuple[Tensor, Tensor], int]:
        """Keys and values from the start of the block that was open before this step, and that start."""
        before = length - key_THD.shape[0]
        start = before // codec.spec.block * codec.spec.block
        place = torch.arange(start, before, device=key_THD.device) % places_HXPD.shape[2]
        old_keys, old_values = places_HXPD[:, :, place].transpose(0, 2).unbind(1)
        return (torch.cat([old_keys, key_THD]), torch.cat([old_values, value_THD])), start

    def _seal(
        self,
        codec: BlockCodec,
        pages_NHMB: Tensor,
        place: tuple[Tensor, Tensor],
        exact_THD: tuple[Tensor, Tensor],
        first: int,
    ) -> None:
        """Compress the blocks from `first` that are complete by now into their pages."""
        page, within = (index[first:] for index in place)
        if page.shape[0]:
            whole = page.shape[0] * codec.spec.block
            pages_NHMB[page, :, within] = codec.seal(exact_THD[0][:whole], exact_THD[1][:whole])

    def _keep(self, places_HXPD: Tensor, key_THD: Tensor, value_THD: Tensor, length: int) -> None:
        """Put the step's last tokens, as many as fit, into the ring."""
        count = min(key_THD.shape[0], places_HXPD.shape[2])
        place = torch.arange(length - count, length, device=key_THD.device) % places_HXPD.shape[2]
        places_HXPD[:, :, place] = torch.stack([key_THD[-count:], value_THD[-count:]], 1).transpose(0, 2)

    def _attend(
        self,
        codec: BlockCodec,
        query_THD: Tensor,
        latents_THR: tuple[Tensor, Tensor],
        exact_THD: tuple[Tensor, Tensor],
        exact_start: int,
        output_THD: Tensor,
    ) -> None:
        """Attention of one request's queries, a bounded number of scores at a time."""
        queries, block = query_THD.shape[0], codec.spec.block
        rows = latents_THR[0].shape[0] + exact_THD[0].shape[0]
        step = max(1, reference.SCORE_BYTES // (4 * self.num_heads * rows))
        length = exact_start + exact_THD[0].shape[0]
        for first in range(0, queries, step):
            last = min(first + step, queries)
            # Tokens after the chunk's last query are invisible to all of it.
            end = length - (queries - last)
            k_latent_THR, v_latent_THR = (latent[: end // block * block] for latent in latents_THR)
            keys_THD, values_THD = (side[: end - exact_start] for side in exact_THD)
            mixed_QHGD = attend(
                query_THD[first:last].unflatten(1, (self.num_kv_heads, -1)),
                (k_latent_THR, v_latent_THR),
                (keys_THD, values_THD),
                exact_start,
                codec,
                self.scale,
            )
            output_THD[first:last] = mixed_QHGD.flatten(1, 2).to(output_THD.dtype)
