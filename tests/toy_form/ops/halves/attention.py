"""The operations on pages of form `halves`, which are `float16 [blocks, KV heads, tokens per block, 2, head_dim]`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.toy_form.codec.halves.codec import HalvesCodec


class HalvesOp:
    on_kernels = False

    def __init__(self, codec: HalvesCodec) -> None:
        self.codec = codec

    def append(self, pages_NHSXD: Tensor, keys_THD: Tensor, values_THD: Tensor, slots_T: Tensor) -> None:
        block_size, stored_T = pages_NHSXD.shape[2], slots_T >= 0
        slots_T = slots_T[stored_T]
        tokens_THXD = torch.stack([self.codec.encode(side[stored_T]) for side in (keys_THD, values_THD)], dim=2)
        pages_NHSXD[slots_T // block_size, :, slots_T % block_size] = tokens_THXD

    def read(self, pages_NHSXD: Tensor, blocks_N: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[length, KV heads, head_dim]` of a request's first tokens."""
        tokens_THXD = pages_NHSXD[blocks_N.long()].transpose(1, 2).flatten(0, 1)[:length]
        keys_THD, values_THD = self.codec.decode(tokens_THXD).unbind(2)
        return keys_THD, values_THD

    def attend(
        self,
        output_THD: Tensor,
        query_THD: Tensor,
        pages_NHSXD: Tensor,
        block_table_RN: Tensor,
        starts: Sequence[int],
        lengths: Sequence[int],
        scale: float,
    ) -> None:
        for request, length in enumerate(lengths):
            rows = slice(starts[request], starts[request + 1])
            blocks_N = block_table_RN[request, : -(-length // pages_NHSXD.shape[2])]
            sides = (side_THD.transpose(0, 1) for side_THD in self.read(pages_NHSXD, blocks_N, length))
            queries = rows.stop - rows.start
            seen = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
            mixed_HQD = torch.nn.functional.scaled_dot_product_attention(
                query_THD[rows].transpose(0, 1).float(), *sides, attn_mask=seen, scale=scale, enable_gqa=True
            )
            output_THD[rows] = mixed_HQD.transpose(0, 1).to(output_THD.dtype)


def bind(codec: HalvesCodec, device: torch.device | str) -> HalvesOp:
    return HalvesOp(codec.to(device))
