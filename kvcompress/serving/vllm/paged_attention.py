"""Attention over compressed pages for a batch of requests, in plain torch. Knows nothing of vLLM.

This is the seam for compiled kernels: whatever replaces `attend_batch` and `codec.pages.append` takes the same page
tensor, block table, lengths, layout and codec.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvcompress.codec import pages
from kvcompress.codec.attention import attend
from kvcompress.codec.layer import LayerCodec
from kvcompress.codec.layout import PageLayout

SCORE_BYTES = 64 * 2**20
"""Bound on the scores (queries x tokens) held at a time: a long prefill is attended in chunks of queries."""

_FLOAT_BYTES = 4


def attend_batch(
    output_THD: Tensor,
    query_THD: Tensor,
    pages_NHX: Tensor,
    layout: PageLayout,
    codec: LayerCodec,
    block_table_RN: Tensor,
    query_starts: Sequence[int],
    seq_lens: Sequence[int],
    softmax_scale: float,
) -> None:
    """Causal attention of every request's newest tokens over all its tokens, which `append` has stored already.

    Args:
        output_THD: result, written in place `[tokens, query heads, head_dim]`.
        query_THD: post-RoPE queries of all requests, one after the other.
        block_table_RN: block numbers of each request's tokens, in order.
        query_starts: where each request's queries begin, and the end of the last `[requests + 1]`.
        seq_lens: tokens of each request, its queries' own included.
    """
    for request, length in enumerate(seq_lens):
        start, stop = query_starts[request], query_starts[request + 1]
        if start == stop:
            continue
        blocks_N = block_table_RN[request, : -(-length // layout.block_size)].long()
        k_latent_THR, v_latent_THR = pages.read(pages_NHX, layout, codec, blocks_N, length)
        query_QHGD = query_THD[start:stop].reshape(stop - start, layout.num_kv_heads, -1, query_THD.shape[2])
        step = max(1, SCORE_BYTES // (_FLOAT_BYTES * query_THD.shape[1] * length))
        for chunk in range(start, stop, step):
            chunk_stop = min(chunk + step, stop)
            # Tokens after the chunk's last query are invisible to all of it.
            visible = length - (stop - chunk_stop)
            mixed_QHGD = attend(
                query_QHGD[chunk - start : chunk_stop - start],
                k_latent_THR[:visible],
                v_latent_THR[:visible],
                codec,
                softmax_scale,
            )
            output_THD[chunk:chunk_stop] = mixed_QHGD.flatten(1, 2).to(output_THD.dtype)


def workspace_bytes(codec: LayerCodec, num_heads: int, longest: int) -> int:
    """Bytes `attend_batch` takes at most beside its arguments, for requests of up to `longest` tokens."""
    spec = codec.spec
    latents = longest * spec.num_kv_heads * (spec.k.rank + spec.v.rank) * _FLOAT_BYTES
    # Unpacked codes, their values and the concatenated latents live side by side; scores, masked scores and
    # probabilities do, too.
    return 3 * latents + 3 * max(SCORE_BYTES, num_heads * longest * _FLOAT_BYTES)
