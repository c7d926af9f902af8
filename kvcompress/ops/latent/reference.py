"""Attention on pages of form `latent` by the torch code that specifies it.

One vector per token is the key of all heads, and its start the value.

Pages are `[blocks, tokens per block, channels]` in float32, bfloat16 or float16; blocks may be strided. A slot is
block * tokens per block + offset.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.ops.heads.reference import SCORE_BYTES
from kvcompress.ops.rows import Numbers, host_list

SPLIT_TOKENS = 1024
"""Tokens one thread attends at a time: fewer than of per-head pages, because all heads are one piece of work."""


class LatentOp:
    """One layer's operations. Kernels inherit it and replace what they do faster; `attention.bind` chooses."""

    on_kernels = False
    """Whether CUDA kernels attend."""

    def append(self, pages_NSC: Tensor, key_TC: Tensor, slots_T: Tensor) -> None:
        """Store tokens `[tokens, channels]` in their slots. Slots below 0 are padding and are skipped.

        Raises:
            ValueError: a slot lies outside the cache. On a GPU it is skipped.
        """
        valid = slots_T >= 0
        if not bool(valid.all()):
            key_TC, slots_T = key_TC[valid], slots_T[valid]
        block_size = pages_NSC.shape[1]
        pages_NSC[slots_T // block_size, slots_T % block_size] = key_TC.to(pages_NSC.dtype)

    def attend(
        self,
        output_THR: Tensor,
        query_THC: Tensor,
        pages_NSC: Tensor,
        block_table_RN: Tensor,
        query_starts: Numbers,
        seq_lens: Numbers,
        softmax_scale: float,
        split_tokens: int = SPLIT_TOKENS,
        max_query_len: int | None = None,
    ) -> None:
        """Causal attention of every request's new tokens over all of its tokens, in float32.

        Args:
            output_THR: written in place; R, the latent's channels, are the first of the cached vector's.
            query_THC: absorbed queries `[tokens, heads, channels]`; float32, bfloat16 or float16.
            pages_NSC: what `append` has stored, the new tokens included.
            block_table_RN: blocks of each request, in order; entries past its end are not read.
            query_starts: where each request's new tokens start in query and output, and where the last one's end.
            seq_lens: tokens of each request, new ones included.
            softmax_scale: on the product of query and cached vector.
            split_tokens: a positive multiple of 64; of no effect on a GPU.
            max_query_len: the most queries of a request, for a GPU: its kernels read lengths on the device, and start
                enough threads for any lengths.

        Raises:
            ValueError: a request has more queries than tokens, or a block lies outside the cache; neither is looked
                for on a GPU.
        """
        query_starts = host_list(query_starts)
        rank, heads = output_THR.shape[2], query_THC.shape[1]
        for request, length in enumerate(host_list(seq_lens)):
            start, stop = query_starts[request], query_starts[request + 1]
            if start == stop:
                continue
            blocks_N = block_table_RN[request, : -(-length // pages_NSC.shape[1])].long()
            keys_LC = pages_NSC[blocks_N].flatten(0, 1)[:length].float()
            step = max(1, SCORE_BYTES // (4 * heads * length))
            for first in range(start, stop, step):
                last = min(first + step, stop)
                # Tokens after the chunk's last query are invisible to all of it.
                visible = length - (stop - last)
                queries = last - first
                query_HQC = query_THC[first:last].float().transpose(0, 1) * softmax_scale
                scores_HQL = query_HQC @ keys_LC[:visible].mT
                if queries > 1:
                    mask_QL = torch.ones(queries, visible, dtype=torch.bool, device=scores_HQL.device)
                    scores_HQL = scores_HQL.masked_fill(~mask_QL.tril(visible - queries), -torch.inf)
                mixed_HQR = scores_HQL.softmax(-1) @ keys_LC[:visible, :rank]
                output_THR[first:last] = mixed_HQR.transpose(0, 1).to(output_THR.dtype)

    def workspace_bytes(self, tokens: int, num_heads: int, rank: int, longest: int) -> int:
        """Bytes that `attend` takes at most beside its arguments, in steps of `tokens`, for requests of `longest`."""
        return 0
