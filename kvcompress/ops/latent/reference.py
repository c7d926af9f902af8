"""Attention on pages of form `latent` by the torch code that specifies it.

One vector per token is the key of all heads, and its start the value.

Pages are `[blocks, tokens per block, channels]` in float32, bfloat16 or float16; blocks may be strided. A slot is
block * tokens per block + offset.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.ops.call import Call


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

    def attend(self, call: Call, pages_NSC: Tensor) -> None:
        """Attention over tokens that `append` has stored already, in float32.

        Args:
            call: queries are absorbed `[tokens, heads, channels]`, and of the output `[tokens, heads, rank]` the
                channels are the first of the cached vector's.

        Raises:
            ValueError: a request has more queries than tokens, or a block lies outside the cache; neither is looked
                for on a GPU.
        """
        rank = call.output_THD.shape[2]
        for request, rows, length in call.requests():
            blocks_N = call.block_table_RN[request, : -(-length // pages_NSC.shape[1])].long()
            keys_LC = pages_NSC[blocks_N].flatten(0, 1)[:length].float()
            for chunk, visible in call.chunks(rows, length, length):
                queries = chunk.stop - chunk.start
                query_HQC = call.query_THD[chunk].float().transpose(0, 1) * call.softmax_scale
                scores_HQL = query_HQC @ keys_LC[:visible].mT
                if queries > 1:
                    mask_QL = torch.ones(queries, visible, dtype=torch.bool, device=scores_HQL.device)
                    scores_HQL = scores_HQL.masked_fill(~mask_QL.tril(visible - queries), -torch.inf)
                mixed_HQR = scores_HQL.softmax(-1) @ keys_LC[:visible, :rank]
                call.output_THD[chunk] = mixed_HQR.transpose(0, 1).to(call.output_THD.dtype)

    def workspace_bytes(self, tokens: int, num_heads: int, rank: int, longest: int) -> int:
        """Bytes that `attend` takes at most beside its arguments, in steps of `tokens`, for requests of `longest`."""
        return 0
