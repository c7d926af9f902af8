"""The operations on pages of form `blocks` by torch, on any device: what a step stores, and attention.

`seal` comes before attention and `keep` after it: the newest tokens take the places of older ones that attention reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.codec.blocks import attention
from kvcompress.codec.blocks.codec import BlocksCodec
from kvcompress.ops.blocks.plan import BlocksPlan
from kvcompress.ops.call import SCORE_BYTES, Call
from kvcompress.ops.rows import Numbers, host_list, int32_rows


class BlocksOp:
    """One layer's operations. Kernels inherit it and replace what they do faster; `attention.bind` chooses.

    Pages are `uint8 [pages, KV heads, blocks per page, record_bytes]`, possibly strided. Rings are
    `[rings, KV heads, 2 (keys, values), places, head_dim]`: the token at position p of an incomplete block, from before
    this step, is in place p % places.
    """

    on_kernels = False
    """Whether CUDA kernels attend."""

    def __init__(self, codec: BlocksCodec) -> None:
        self.plan = BlocksPlan(codec)

    def seal(
        self, call: Call, keys_THD: Tensor, values_THD: Tensor, pages_NHMB: Tensor, rings_NHXPD: Tensor, ring_R: Tensor
    ) -> None:
        """Compress every block that is complete by the step's end and was not before it; arguments as in `attend`.

        By torch, all blocks of the step at once. Which blocks they are must be known here: starts and lengths on the
        host keep a GPU from being waited for.
        """
        block, per_page, device = self.plan.spec.block, pages_NHMB.shape[2], pages_NHMB.device
        found: list[tuple[Tensor, Tensor]] = []
        pages, places = [], []
        for request, rows, length in call.requests():
            first, last = (length - (rows.stop - rows.start)) // block, length // block
            if first == last:
                continue
            ring_1 = ring_R[request : request + 1]
            exact_THD, _ = newest(rings_NHXPD, ring_1, keys_THD[rows], values_THD[rows], length, block)
            keys, values = (side[: (last - first) * block] for side in exact_THD)
            found.append((keys, values))
            number = torch.arange(first, last, device=device)
            pages.append(call.block_table_RN[request].long()[number // per_page])
            places.append(number % per_page)
        if found:
            keys, values = (torch.cat(side) for side in zip(*found, strict=True))
            pages_NHMB[torch.cat(pages), :, torch.cat(places)] = self.plan.codec.seal(keys, values)

    def read(self, pages_NHMB: Tensor, block_1: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized latents `[tokens, KV heads, rank]` of one page's keys and values."""
        return self.plan.codec.open(pages_NHMB[block_1][0].transpose(0, 1))

    def keep(self, call: Call, keys_THD: Tensor, values_THD: Tensor, rings_NHXPD: Tensor, ring_R: Tensor) -> None:
        """Put each request's last tokens, as many as fit, into its ring; arguments as in `attend`."""
        starts_R, lengths_R = int32_rows(call.query_starts), int32_rows(call.seq_lens)
        device, places = keys_THD.device, rings_NHXPD.shape[3]
        request_T = torch.repeat_interleave(starts_R.diff())
        # Tokens of the request after each one, itself included.
        left_T = starts_R[1:][request_T] - torch.arange(request_T.shape[0])
        place_T = (lengths_R[request_T] - left_T) % places
        kept_T = (left_T <= places).nonzero().flatten().to(device)
        ring_T, place_T = ring_R[request_T.to(device)].long()[kept_T], place_T.to(device)[kept_T]
        rings_NHXPD[ring_T, :, 0, place_T] = keys_THD[kept_T]
        rings_NHXPD[ring_T, :, 1, place_T] = values_THD[kept_T]

    def attend(
        self, call: Call, keys_THD: Tensor, values_THD: Tensor, pages_NHMB: Tensor, rings_NHXPD: Tensor, ring_R: Numbers
    ) -> None:
        """Attention on complete blocks in pages and newer tokens in rings; `codec.blocks.codec` says what a query sees.

        Args:
            call: its block table has pages of complete blocks, each of which is in its page already.
            keys_THD, values_THD: the step's own `[tokens, KV heads, head_dim]`.
            ring_R: the ring of each request.

        Raises:
            ValueError: a request has more queries than tokens, or a page or ring lies outside the cache; neither is
                looked for on a GPU.
        """
        codec, spec, per_page, rings = self.plan.codec, self.plan.spec, pages_NHMB.shape[2], host_list(ring_R)
        for request, rows, length in call.requests():
            blocks = torch.arange(length // spec.block, device=pages_NHMB.device)
            page = call.block_table_RN[request].long()[blocks // per_page]
            latents_THR = codec.open(pages_NHMB[page, :, blocks % per_page])
            ring_1 = torch.tensor([rings[request]], device=pages_NHMB.device)
            exact_THD, exact_start = newest(rings_NHXPD, ring_1, keys_THD[rows], values_THD[rows], length, spec.block)
            attended = latents_THR[0].shape[0] + exact_THD[0].shape[0]
            for chunk, end in call.chunks(rows, length, attended):
                k_latent_THR, v_latent_THR = (latent[: end // spec.block * spec.block] for latent in latents_THR)
                exact_keys_THD, exact_values_THD = (side[: end - exact_start] for side in exact_THD)
                mixed_QHGD, lse_QHG = attention.attend(
                    call.query_THD[chunk].unflatten(1, (spec.num_kv_heads, -1)),
                    (k_latent_THR, v_latent_THR),
                    (exact_keys_THD, exact_values_THD),
                    exact_start,
                    codec,
                    call.softmax_scale,
                )
                call.output_THD[chunk] = mixed_QHGD.flatten(1, 2).to(call.output_THD.dtype)
                if call.lse_TH is not None:
                    call.lse_TH[chunk] = lse_QHG.flatten(1)

    def workspace_bytes(self, tokens: int, num_heads: int, longest: int) -> int:
        """Bytes that `attend` takes at most beside its arguments, in steps of `tokens`, for requests of `longest`."""
        spec = self.plan.spec
        latents = longest * spec.num_kv_heads * (spec.k.rank + spec.v.rank) * torch.float32.itemsize
        scores = max(SCORE_BYTES, num_heads * longest * torch.float32.itemsize)
        # Codes, values of codes, residuals and latents live side by side; so do scores, masked ones and probabilities.
        return 4 * latents + 3 * scores


def newest(
    rings_NHXPD: Tensor, ring_1: Tensor, key_THD: Tensor, value_THD: Tensor, length: int, block: int
) -> tuple[tuple[Tensor, Tensor], int]:
    """A request's keys and values from the start of the block that was open before this step, and that start.

    Args:
        ring_1: the request's ring, a number that is not read here.
        key_THD, value_THD: the step's own.
        length: of the request, the step's tokens included.
    """
    before = length - key_THD.shape[0]
    start = before // block * block
    place = torch.arange(start, before, device=key_THD.device) % rings_NHXPD.shape[3]
    old_keys, old_values = rings_NHXPD[ring_1.long(), :, :, place].unbind(2)
    return (torch.cat([old_keys, key_THD]), torch.cat([old_values, value_THD])), start
