"""Caches of random MLA latents with permuted blocks, everything unused NaN, and attention on them in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.cases.heads import starts
from kvcompress.codec.latent.codec import LatentCodec
from kvcompress.codec.latent.spec import LatentSpec
from kvcompress.ops.call import Call
from kvcompress.ops.latent.attention import bind
from kvcompress.ops.latent.reference import LatentOp

# Channels, rank and heads for every instance of csrc/cuda/latent/api.cu, with two queries: 32 rows, 16 rows, more
# channels or a longer output than these have room for; ranks and heads that fill no tile. On an H200, rings of 2 to 4
# tiles.
SHAPES = [
    (576, 512, 32),
    (576, 512, 8),
    (304, 289, 20),
    (112, 96, 3),
    (16, 5, 1),
    (656, 600, 9),
    (576, 528, 40),
]


def bar(dtype: torch.dtype) -> float:
    """Relative error of the output: its own rounding and that of the weights, each to half a last place at most."""
    return torch.finfo(dtype).eps * 0.6


def bind_pages(pages_NSC: Tensor) -> LatentOp:
    """Operations on such pages; of the rank they know nothing."""
    codec = LatentCodec(LatentSpec(pages_NSC.shape[2], pages_NSC.shape[2], pages_NSC.element_size()))
    return bind(codec, pages_NSC.device, pages_NSC.dtype)


class Cache:
    """Requests in blocks of random numbers, everything unused NaN."""

    def __init__(self, lengths: Sequence[int], channels: int, dtype: torch.dtype, block_size: int = 16) -> None:
        self.generator = torch.Generator().manual_seed(7)
        counts = [-(-length // block_size) for length in lengths]
        numbers = torch.randperm(sum(counts) + 3, generator=self.generator)
        # Blocks and tokens lie in a wider tensor.
        wide = torch.full((len(numbers), 2, block_size, channels + 8), torch.nan, dtype=dtype)
        self.pages_NSC = wide[:, 0, :, :channels]
        self.block_table_RN = torch.full((len(lengths), max(counts) + 2), -1, dtype=torch.int32)
        self.seq_lens = list(lengths)
        self.keys: list[Tensor] = []
        used = 0
        for request, count in enumerate(counts):
            self.block_table_RN[request, :count] = numbers[used : used + count]
            used += count
            token_T = torch.arange(lengths[request])
            slots_T = self.block_table_RN[request].long()[token_T // block_size] * block_size + token_T % block_size
            self.keys.append(torch.randn(lengths[request], channels, generator=self.generator).to(dtype))
            LatentOp().append(self.pages_NSC, self.keys[-1], slots_T)

    @property
    def op(self) -> LatentOp:
        """Whom `bind` chooses for these pages."""
        return bind_pages(self.pages_NSC)

    def query(self, tokens: int, heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(tokens, heads, self.pages_NSC.shape[2], generator=self.generator).to(dtype)

    def attend(self, query_THC: Tensor, query_lens: list[int], rank: int, **settings: int) -> Tensor:
        """By whom `bind` chooses; settings are attributes of it."""
        op, call = self.op, self.call(query_THC, query_lens, rank)
        for name, number in settings.items():
            assert hasattr(op, name)
            setattr(op, name, number)
        op.attend(call, self.pages_NSC)
        return call.output_THD

    def call(self, query_THC: Tensor, query_lens: Sequence[int], rank: int) -> Call:
        """With numbers as kernels read them, on the host."""
        output_THR = query_THC.new_full((*query_THC.shape[:2], rank), torch.nan)
        numbers = (torch.tensor(rows, dtype=torch.int32) for rows in (starts(query_lens), self.seq_lens))
        return Call(output_THR, query_THC, self.block_table_RN, *numbers, 0.1)

    def exact(self, query_THC: Tensor, query_lens: list[int], rank: int) -> Tensor:
        outputs, first = [], 0
        for keys_LC, queries, length in zip(self.keys, query_lens, self.seq_lens, strict=True):
            query_QHC = query_THC[first : first + queries].double()
            first += queries
            scores_HQL = torch.einsum("qhc,lc->hql", query_QHC, keys_LC.double()) * 0.1
            seen = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
            weights_HQL = scores_HQL.masked_fill(~seen, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hql,lr->qhr", weights_HQL, keys_LC[:, :rank].double()))
        return torch.cat(outputs)
