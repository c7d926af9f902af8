"""The operations on pages of form `heads` by the torch code that specifies them, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.codec.heads import attention, pages
from kvcompress.codec.heads.codec import HeadsCodec
from kvcompress.codec.heads.layout import PageLayout
from kvcompress.codec.layout import TOKEN_MAJOR
from kvcompress.ops.call import SCORE_BYTES, Call
from kvcompress.ops.heads.plan import HeadsPlan


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
        block_size = self._filled_block_size(pages_NHX, keys_THD, blocks_N)
        offset_S = torch.arange(block_size, device=blocks_N.device)
        self.append(pages_NHX, keys_THD, values_THD, (blocks_N.long()[:, None] * block_size + offset_S).flatten())

    def _filled_block_size(self, pages_NHX: Tensor, keys_THD: Tensor, blocks_N: Tensor) -> int:
        """Tokens of a block, of which there are as many as the blocks hold."""
        block_size = self.layout(pages_NHX).block_size
        tokens = blocks_N.shape[0] * block_size
        if keys_THD.shape[0] != tokens:
            raise ValueError(
                f"found {keys_THD.shape[0]} tokens for {blocks_N.shape[0]} blocks of {block_size}; expected {tokens}"
            )
        return block_size

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

    def attend(self, call: Call, pages_NHX: Tensor) -> None:
        """Attention over tokens that `append` has stored already.

        Raises:
            ValueError: a request has more queries than tokens, or a block lies outside the cache; neither is looked
                for on a GPU.
        """
        heads = self.plan.spec.num_kv_heads
        for request, rows, length in call.requests():
            latents_THR = self.read(pages_NHX, call.block_table_RN[request], length)
            for chunk, visible in call.chunks(rows, length, length):
                k_latent_THR, v_latent_THR = (latent_THR[:visible] for latent_THR in latents_THR)
                query_QHGD = call.query_THD[chunk].unflatten(1, (heads, -1))
                mixed_QHGD, lse_QHG = attention.attend(
                    query_QHGD, k_latent_THR, v_latent_THR, self.plan.codec, call.softmax_scale
                )
                call.output_THD[chunk] = mixed_QHGD.flatten(1, 2).to(call.output_THD.dtype)
                if call.lse_TH is not None:
                    call.lse_TH[chunk] = lse_QHG.flatten(1)

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
