"""Random block codecs, pages and rings with permuted numbers and poisoned unused bytes, and attention in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.cases.heads import POISON, starts
from kvcompress.codec.blocks.codec import BlocksCodec, BlockSideCodec
from kvcompress.codec.blocks.spec import BlockSide
from kvcompress.ops.blocks.attention import bind
from kvcompress.ops.blocks.reference import BlocksOp
from kvcompress.ops.call import Call

DRAFTS = 3


def sides(
    rank: int = 32,
    bits: int = 4,
    block: int = 32,
    group: int = 32,
    low_rank: int = 2,
    outliers: int = 16,
    v_rank: int | None = None,
) -> tuple[BlockSide, BlockSide]:
    """Specs of keys and values; keys change their scales after 16 tokens at the earliest."""
    v_rank = v_rank or rank
    return (
        BlockSide(block, rank, bits, "tokens", min(max(group, 16), block), low_rank, 2, outliers),
        BlockSide(block, v_rank, bits, "channels", min(group, v_rank), low_rank, 2, outliers),
    )


def random_codec(heads: int, head_dim: int, specs: tuple[BlockSide, BlockSide], seed: int = 0) -> BlocksCodec:
    generator = torch.Generator().manual_seed(seed)

    def side(spec: BlockSide) -> BlockSideCodec:
        mixing = torch.eye(head_dim) + 0.5 * torch.randn(heads, head_dim, head_dim, generator=generator) / head_dim**0.5
        scale_HR = torch.linspace(2, 0.3, spec.rank).repeat(heads, 1)
        mean_HD = torch.randn(heads, head_dim, generator=generator)
        inverse_HRD = torch.linalg.inv(mixing)[:, : spec.rank].contiguous()
        return BlockSideCodec(spec, mean_HD, mixing[..., : spec.rank].contiguous(), inverse_HRD, scale_HR)

    return BlocksCodec(side(specs[0]), side(specs[1]))


@dataclass
class Batch:
    """Requests in the middle of a step: complete blocks in pages, older open tokens in rings, the step's own beside."""

    op: BlocksOp
    pages_NHMB: Tensor
    rings_NHXPD: Tensor
    ring_R: list[int]
    block_table_RN: Tensor
    histories: list[tuple[Tensor, Tensor]]
    query_lens: list[int]

    @property
    def query_starts(self) -> list[int]:
        return starts(self.query_lens)

    @property
    def seq_lens(self) -> list[int]:
        return [keys.shape[0] for keys, _ in self.histories]

    def newest(self, side: int) -> Tensor:
        tokens = [
            history[side][len(history[side]) - count :]
            for history, count in zip(self.histories, self.query_lens, strict=True)
        ]
        return torch.cat(tokens)

    @property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """The step's own keys and values."""
        return self.newest(0), self.newest(1)

    @property
    def caches(self) -> tuple[Tensor, Tensor, list[int]]:
        return self.pages_NHMB, self.rings_NHXPD, self.ring_R

    def call(
        self, query_THD: Tensor, softmax_scale: float | None = None, max_query_len: int | None = None
    ) -> tuple[Call, Tensor, Tensor]:
        """What attention is asked, and where it writes output and lse."""
        output_THD = torch.full_like(query_THD, torch.nan)
        lse_TH = torch.full(query_THD.shape[:2], torch.nan, device=query_THD.device)
        batch = (self.block_table_RN, self.query_starts, self.seq_lens)
        scale = softmax_scale or query_THD.shape[2] ** -0.5
        return Call(output_THD, query_THD, *batch, scale, lse_TH, max_query_len), output_THD, lse_TH

    def attend(
        self,
        query_THD: Tensor,
        softmax_scale: float | None = None,
        max_query_len: int | None = None,
        **options: int | None,
    ) -> tuple[Tensor, Tensor]:
        call, output_THD, lse_TH = self.call(query_THD, softmax_scale, max_query_len)
        self.op.attend(call, *self.tokens, *self.caches, **options)
        return output_THD, lse_TH

    def exact(self, query_THD: Tensor) -> tuple[Tensor, Tensor]:
        """Ordinary attention in float64 on what each query sees: stored blocks by its position, else exact tokens."""
        spec, outputs, lses = self.op.plan.spec, [], []
        for request, (start, stop) in enumerate(pairwise(self.query_starts)):
            keys, values = self.histories[request]
            number = torch.arange(len(keys) // spec.block)
            per_page = self.pages_NHMB.shape[2]
            page = self.block_table_RN[request].long()[number // per_page]
            sealed = self.op.plan.codec.reconstruct(self.pages_NHMB[page, :, number % per_page])
            stored = [side.double().transpose(1, 2).flatten(0, 1) for side in sealed]
            for index in range(start, stop):
                position = len(keys) - (stop - index)
                complete = (position + 1) // spec.block * spec.block
                k, v = (
                    torch.cat([old[:complete], new[complete : position + 1].double()])
                    for old, new in zip(stored, (keys, values), strict=True)
                )
                query = query_THD[index].double().unflatten(0, (spec.num_kv_heads, -1))
                scores = torch.einsum("hgd,thd->hgt", query, k) * query.shape[-1] ** -0.5
                outputs.append(torch.einsum("hgt,thd->hgd", scores.softmax(-1), v).flatten(0, 1))
                lses.append(scores.logsumexp(-1).flatten())
        return torch.stack(outputs), torch.stack(lses)


def batch_of(
    codec: BlocksCodec,
    histories: Sequence[tuple[Tensor, Tensor]],
    query_lens: Sequence[int],
    per_page: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Seal and keep what a step leaves for attention, `query_lens` tokens of each request being the step's own."""
    spec = codec.spec
    histories = [tuple(side.to(dtype) for side in history) for history in histories]
    counts = [-(-len(keys) // (per_page * spec.block)) for keys, _ in histories]
    numbers = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(1))
    # Pages lie in wider rows, as where an engine packs several layers into one block.
    wide = torch.full((len(numbers), spec.num_kv_heads + 1, per_page, spec.record_bytes), POISON, dtype=torch.uint8)
    pages_NHMB = wide[:, : spec.num_kv_heads]
    table_RN = torch.full((len(histories), max(counts) + 1), -1, dtype=torch.int32)
    places = spec.block + 1 + DRAFTS
    rings = torch.full((len(histories) + 2, spec.num_kv_heads + 1, 2, places, spec.head_dim), torch.nan, dtype=dtype)
    rings_NHXPD = rings[:, 1:]
    ring_R = torch.randperm(len(histories) + 2, generator=torch.Generator().manual_seed(2))[: len(histories)].tolist()
    used = 0
    for request, (keys, values) in enumerate(histories):
        table_RN[request, : counts[request]] = numbers[used : used + counts[request]]
        used += counts[request]
        number = torch.arange(len(keys) // spec.block)
        whole = len(number) * spec.block
        page = table_RN[request].long()[number // per_page]
        pages_NHMB[page, :, number % per_page] = codec.seal(keys[:whole], values[:whole])
        before = len(keys) - query_lens[request]
        position = torch.arange(before // spec.block * spec.block, before)
        rings_NHXPD[ring_R[request], :, :, position % places] = torch.stack([keys[position], values[position]]).permute(
            2, 0, 1, 3
        )
    return Batch(bind(codec, "cpu"), pages_NHMB, rings_NHXPD, ring_R, table_RN, histories, list(query_lens))


def random_batch(
    codec: BlocksCodec,
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    per_page: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    heads, head_dim = codec.spec.num_kv_heads, codec.spec.head_dim
    histories = []
    for length in seq_lens:
        keys, values = 1.5 * torch.randn(2, length, heads, head_dim, generator=generator)
        histories.append((keys, values))
    return batch_of(codec, histories, query_lens, per_page, dtype)
