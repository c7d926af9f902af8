"""The operations on pages of form `heads` by the torch code that specifies them, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.codec.heads import attention, pages
from kvcompress.codec.heads.codec import HeadsCodec
from kvcompress.codec.heads.layout import TOKEN_MAJOR, PageLayout
from kvcompress.ops.heads.plan import HeadsPlan
from kvcompress.ops.rows import Numbers, host_list

SCORE_BYTES = 64 * 2**20
"""Bound on the scores (queries x tokens) held at a time: a long prefill is attended in chunks of queries."""

SPLIT_TOKENS = 4096
"""Tokens one thread attends at a time. Fixed positions, so that a result depends on nothing but its own tokens."""


class HeadsOp:
    """One layer's operations. Kernels inherit it and replace what they do faster; `attention.bind` chooses.

    Pages are `uint8 [num_blocks, num_kv_heads, record_bytes]`; blocks may be strided.
    """

    on_kernels = False
    """Whether CUDA kernels attend."""

    def __init__(self, codec: HeadsCodec, order: str = TOKEN_MAJOR) -> None:
        self.plan = HeadsPlan(codec)
        self.order = order
        """Of the bytes in a record."""

    def layout(self, pages_NHX: Tensor) -> PageLayout:
        return self.plan.layout(pages_NHX, self.order)

    def append(self, pages_NHX: Tensor, keys_THD: Tensor, values_THD: Tensor, slots_T: Tensor) -> None:
        """Encode tokens and store them in their slots.

        Args:
            pages_NHX: written in place.
            keys_THD, values_THD: `[tokens, num_kv_heads, head_dim]`, keys after RoPE; float32, bfloat16 or float16.
            slots_T: block * block_size + offset of each token; below 0: padding, skipped.

        Raises:
            ValueError: a slot lies outside the cache; on a GPU, such a slot is skipped.
        """
        pages.append(pages_NHX, self.layout(pages_NHX), self.plan.codec, keys_THD, values_THD, slots_T)

    def compress(self, pages_NHX: Tensor, keys_THD: Tensor, values_THD: Tensor, blocks_N: Tensor) -> None:
        """Encode tokens that fill blocks one after the other: what a prefill leaves behind; the bytes of `append`.

        Args:
            keys_THD, values_THD: `[len(blocks_N) * block_size, num_kv_heads, head_dim]`, keys after RoPE.
            blocks_N: which blocks.

        Raises:
            ValueError: there are not as many tokens as the blocks hold; or, not on a GPU, a block lies outside the
                cache.
        """
        block_size = self.layout(pages_NHX).block_size
        tokens = blocks_N.shape[0] * block_size
        if keys_THD.shape[0] != tokens:
            raise ValueError(
                f"found {keys_THD.shape[0]} tokens for {blocks_N.shape[0]} blocks of {block_size}; expected {tokens}"
            )
        offset_S = torch.arange(block_size, device=blocks_N.device)
        self.append(pages_NHX, keys_THD, values_THD, (blocks_N.long()[:, None] * block_size + offset_S).flatten())

    def read(
        self, pages_NHX: Tensor, block_table_N: Tensor, length: int, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Normalized latents `[length, num_kv_heads, rank]` of one request's first tokens: keys' and values'.

        Times decode_HRD and plus mean_HD they are keys and values.

        Args:
            block_table_N: the request's blocks, in order.
            dtype: float32, bfloat16 or float16.
        """
        layout = self.layout(pages_NHX)
        blocks_N = block_table_N[: -(-length // layout.block_size)].long()
        k_THR, v_THR = pages.read(pages_NHX, layout, self.plan.codec, blocks_N, length)
        return k_THR.to(dtype), v_THR.to(dtype)

    def attend(
        self,
        output_THD: Tensor,
        query_THD: Tensor,
        pages_NHX: Tensor,
        block_table_RN: Tensor,
        query_starts: Numbers,
        seq_lens: Numbers,
        softmax_scale: float,
        lse_TH: Tensor | None = None,
        split_tokens: int = SPLIT_TOKENS,
        max_query_len: int | None = None,
    ) -> None:
        """Causal attention of every request's newest tokens over all its tokens, which `append` has stored already.

        Args:
            output_THD: result, written in place `[tokens, query heads, head_dim]`.
            query_THD: post-RoPE queries of all requests, one after the other; float32, bfloat16 or float16.
            block_table_RN: block numbers of each request's tokens, in order; entries past its end are not read.
            query_starts: where each request's queries begin, and the end of the last `[requests + 1]`.
            seq_lens: tokens of each request, its queries' own included `[requests]`. On a GPU, numbers of a few
                queries per request should be the device's, numbers of more the host's: then nobody waits.
            softmax_scale: usually head_dim ** -0.5.
            lse_TH: if given, receives each row's log of the sum of exponentials, float32 `[tokens, query heads]`.
            split_tokens: a positive multiple of 64, for CPU kernels.
            max_query_len: the most queries of a request, for a GPU: its kernels read lengths on the device, and start
                enough threads for any lengths.

        Raises:
            ValueError: a request has more queries than tokens, or a block lies outside the cache; neither is looked
                for on a GPU.
        """
        codec, starts = self.plan.codec, host_list(query_starts)
        for request, length in enumerate(host_list(seq_lens)):
            start, stop = starts[request], starts[request + 1]
            if start == stop:
                continue
            k_latent_THR, v_latent_THR = self.read(pages_NHX, block_table_RN[request], length)
            query_QHGD = query_THD[start:stop].unflatten(1, (self.plan.spec.num_kv_heads, -1))
            step = max(1, SCORE_BYTES // (4 * query_THD.shape[1] * length))
            for first in range(start, stop, step):
                last = min(first + step, stop)
                # Tokens after the chunk's last query are invisible to all of it.
                visible = length - (stop - last)
                mixed_QHGD, lse_QHG = attention.attend(
                    query_QHGD[first - start : last - start],
                    k_latent_THR[:visible],
                    v_latent_THR[:visible],
                    codec,
                    softmax_scale,
                )
                output_THD[first:last] = mixed_QHGD.flatten(1, 2).to(output_THD.dtype)
                if lse_TH is not None:
                    lse_TH[first:last] = lse_QHG.flatten(1)

    def workspace_bytes(self, tokens: int, num_heads: int, longest: int, dtype: torch.dtype) -> int:
        """Bytes that `attend` takes at most beside its arguments.

        Args:
            tokens: of a step.
            longest: tokens of a request.
            dtype: of the queries.
        """
        spec = self.plan.spec
        latents = longest * spec.num_kv_heads * (spec.k.rank + spec.v.rank) * torch.float32.itemsize
        scores = max(SCORE_BYTES, num_heads * longest * torch.float32.itemsize)
        # Unpacked codes, their values and the concatenated latents live side by side; so do scores, masked scores and
        # probabilities.
        return 3 * (latents + scores)
