"""What vLLM's block manager is told about a layer whose cache has the form `blocks`: two caches.

Complete blocks are pages like any other: found by prefix, shared, offloaded. The incomplete block of a request cannot
lie in a page, which has room for compressed bytes only, and a page must be final when the step that filled it ends. So
the newest tokens wait, as they are, in a ring of their own: one block per request, which vLLM takes and gives back
with the request and never looks up by prefix.

With B tokens per block, c tokens of a request committed before a step and s = c // B * B:

- tokens before s are read from pages, tokens [s, c) from the ring, the step's own from its keys and values;
- every block inside [s, end of the step) is written in this step, drafts included: if drafts are rejected, c stays
  below that block's end, its tokens come from the ring again, and the page is written again before it is read;
- prefix hits and fresh starts have c = s, so what an earlier request left in the ring is never read.

The step before wrote its last tokens up to c + drafts - 1, so the ring must hold B - 1 + drafts tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress.codec.blocks.spec import BlocksSpec
from kvcompress.serving.vllm import compat


@dataclass(frozen=True, kw_only=True)
class RingSpec(compat.CircularBufferSpec):  # type: ignore[misc]
    """One block per request. Its `block_size` is that of the pages, whatever the ring holds: prefix hits are cut to
    common multiples of all block sizes.
    """

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        # vLLM's first model runner maps every token of every group to a slot and looks it up in the request's row.
        del vllm_config
        return -(-max_len // int(self.block_size))


class Ring(compat.AttentionLayerBase):  # type: ignore[misc]
    """The ring of one layer, beside that layer in vLLM's books.

    Its cache is `[blocks, KV heads, 1, 2 * tokens * head_dim]` in the model's dtype: keys, then values; the token at
    position p is in place p % tokens.
    """

    def __init__(
        self, name: str, layer: BlocksSpec, tokens: int, dtype: torch.dtype, backend: type[compat.Backend]
    ) -> None:
        assert tokens >= layer.block
        self.name, self.tokens = name, tokens
        self._layer, self._dtype, self._backend = layer, dtype, backend
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[compat.Backend]:
        return self._backend

    def get_kv_cache_spec(self, vllm_config: Any) -> RingSpec:
        block_size = compat.block_size_of(vllm_config)
        row = self.tokens * self._layer.head_dim
        spec = RingSpec(
            block_size=block_size,
            num_kv_heads=self._layer.num_kv_heads,
            head_size=row,
            head_size_v=row,
            dtype=self._dtype,
            tokens_per_state=block_size,
        )
        assert spec.page_size_bytes == self.nbytes
        return spec

    @property
    def nbytes(self) -> int:
        """Bytes that each request takes in this layer while it runs."""
        return self._layer.open_block_bytes(self._dtype.itemsize, self.tokens)

    @property
    def sides_NHXPD(self) -> Tensor:
        """The cache as `[blocks, KV heads, 2 (keys, values), places, head_dim]`."""
        view: Tensor = self.kv_cache.view(*self.kv_cache.shape[:2], 2, self.tokens, self._layer.head_dim)
        return view
