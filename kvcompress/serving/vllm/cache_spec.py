"""What vLLM's block manager is told about a compressed layer: how many bytes a block takes.

vLLM sees a cache as `[blocks, heads, tokens, content bytes]`. A record of `PageLayout` has no padding, so its size is
tokens times a constant and fits that form without a spec class of our own: vLLM's full-attention spec with packed
content. That keeps every rule of the block manager (layers of different size in one group, block sizes scaled or
split for hybrid models, merging, pickling) in the one implementation vLLM tests.
"""

from __future__ import annotations

import torch

from kvcompress.codec.heads.layout import PageLayout
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.serving.vllm.compat import FullAttentionSpec


def cache_spec(layer: HeadsSpec, block_size: int) -> FullAttentionSpec:
    """The cache spec of one layer on this rank.

    Args:
        layer: the codec of the KV heads this rank holds.
        block_size: tokens per block.

    Raises:
        ValueError: block_size is not a positive multiple of 16.
    """
    layout = PageLayout.of(layer, block_size)
    spec = FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=layer.num_kv_heads,
        head_size=layer.head_dim,
        dtype=torch.uint8,
        state_content_bytes=layer.k.bytes_per_token + layer.v.bytes_per_token,
    )
    assert spec.page_size_bytes == layout.page_bytes
    return spec
