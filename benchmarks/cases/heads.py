"""Random codecs, caches with permuted blocks and poisoned unused bytes, and attention on them in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.codec.bands import Band, SideSpec
from kvcompress.codec.heads import pages
from kvcompress.codec.heads.codec import HeadsCodec, SideCodec
from kvcompress.codec.heads.layout import PageLayout
from kvcompress.ops.call import Call
from kvcompress.ops.heads.reference import HeadsOp

POISON = 0xFF
"""As halves: NaN; as block numbers: -1."""


def bands(*pairs: tuple[int, int], outliers: int = 0) -> SideSpec:
    return SideSpec(tuple(Band(bits, width) for bits, width in pairs), outliers)


def random_codec(heads: int, head_dim: int, k: SideSpec, v: SideSpec, seed: int = 0) -> HeadsCodec:
    generator = torch.Generator().manual_seed(seed)

    def side(spec: SideSpec) -> SideCodec:
        mixing_HDD = torch.randn(heads, head_dim, head_dim, generator=generator)
        basis_HDR = torch.linalg.qr(mixing_HDD)[0][..., : spec.rank].contiguous()
        scale_HR = torch.linspace(2, 0.3, spec.rank).expand(heads, -1).contiguous()
        mean_HD = torch.randn(heads, head_dim, generator=generator)
        return SideCodec(spec, mean_HD, basis_HDR, basis_HDR.mT.contiguous(), scale_HR)

    return HeadsCodec(side(k), side(v))


@dataclass
class Cache:
    """Requests stored by the reference `codec.pages.append`, in blocks of random numbers; `op` attends to them."""

    op: HeadsOp
    pages_NHX: Tensor
    block_table_RN: Tensor
    seq_lens: list[int]

    @property
    def codec(self) -> HeadsCodec:
        return self.op.plan.codec

    @property
    def layout(self) -> PageLayout:
        return self.op.layout(self.pages_NHX)

    def attend(
        self,
        query_THD: Tensor,
        query_lens: Sequence[int],
        softmax_scale: float | None = None,
        max_query_len: int | None = None,
        **options: int,
    ) -> tuple[Tensor, Tensor]:
        """Output and lse, of the newest tokens of each request."""
        output_THD = torch.full_like(query_THD, torch.nan)
        lse_TH = torch.full(query_THD.shape[:2], torch.nan, device=query_THD.device)
        scale = softmax_scale or query_THD.shape[2] ** -0.5
        batch = (self.block_table_RN, starts(query_lens), self.seq_lens)
        self.op.attend(Call(output_THD, query_THD, *batch, scale, lse_TH, max_query_len), self.pages_NHX, **options)
        return output_THD, lse_TH


def fill(
    codec: HeadsCodec, keys: Sequence[Tensor], values: Sequence[Tensor], block_size: int = 16, seed: int = 0
) -> Cache:
    """Store one tensor of keys and one of values `[tokens, heads, head_dim]` per request."""
    layout = PageLayout.of(codec.spec, block_size)
    lengths = [tensor.shape[0] for tensor in keys]
    counts = [-(-length // block_size) for length in lengths]
    numbers = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed))
    # Blocks lie in a wider tensor, as an engine's do that packs several layers into one block.
    wide_NHX = torch.full((len(numbers), layout.num_kv_heads + 1, layout.record_bytes), POISON, dtype=torch.uint8)
    pages_NHX = wide_NHX[:, : layout.num_kv_heads]
    block_table_RN = torch.full((len(keys), max(counts) + 2), -1, dtype=torch.int32)
    used = 0
    for request, count in enumerate(counts):
        block_table_RN[request, :count] = numbers[used : used + count]
        used += count
        token_T = torch.arange(lengths[request])
        slots_T = block_table_RN[request].long()[token_T // block_size] * block_size + token_T % block_size
        pages.append(pages_NHX, layout, codec, keys[request], values[request], slots_T)
    return Cache(HeadsOp(codec), pages_NHX, block_table_RN, lengths)


def random_cache(codec: HeadsCodec, lengths: Sequence[int], block_size: int = 16, seed: int = 0) -> Cache:
    generator = torch.Generator().manual_seed(seed)
    heads, head_dim = codec.k.mean_HD.shape

    def tokens() -> list[Tensor]:
        return [1.5 * torch.randn(length, heads, head_dim, generator=generator) for length in lengths]

    return fill(codec, tokens(), tokens(), block_size, seed)


def exact(cache: Cache, query_THD: Tensor, query_starts: Sequence[int], softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Output and lse of ordinary attention on the decoded cache, in float64."""
    heads = cache.layout.num_kv_heads
    outputs, lses = [], []
    for request, length in enumerate(cache.seq_lens):
        query_QHGD = query_THD[query_starts[request] : query_starts[request + 1]].double().unflatten(1, (heads, -1))
        blocks_N = cache.block_table_RN[request, : -(-length // cache.layout.block_size)].long()
        latents = pages.read(cache.pages_NHX, cache.layout, cache.codec, blocks_N, length)
        keys_THD, values_THD = (
            torch.einsum("thr,hrd->thd", latent.double(), side.decode_HRD.double()) + side.mean_HD.double()
            for latent, side in zip(latents, (cache.codec.k, cache.codec.v), strict=True)
        )
        scores = torch.einsum("qhgd,thd->hgqt", query_QHGD, keys_THD) * softmax_scale
        queries = query_QHGD.shape[0]
        visible = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
        scores = scores.masked_fill(~visible, -torch.inf)
        outputs.append(torch.einsum("hgqt,thd->qhgd", scores.softmax(-1), values_THD).flatten(1, 2))
        lses.append(scores.logsumexp(-1).permute(2, 0, 1).flatten(1))
    return torch.cat(outputs), torch.cat(lses)


def starts(query_lens: Sequence[int]) -> list[int]:
    return [0, *torch.tensor(query_lens).cumsum(0).tolist()]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
