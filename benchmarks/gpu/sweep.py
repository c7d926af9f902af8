"""Decode attention of one Llama-3.1-8B layer: our instances, torch's attention and flash-attn, by context and batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.timing import microseconds
from kvcompress.codec.bands import Band, SideSpec
from kvcompress.codec.heads.codec import HeadsCodec, SideCodec
from kvcompress.codec.heads.layout import PageLayout
from kvcompress.codec.layout import CHUNK_TOKENS, FRAGMENT
from kvcompress.ops.call import Call
from kvcompress.ops.heads.attention import bind
from kvcompress.ops.heads.cuda import CudaHeads

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 64
CONTEXTS, BATCHES = (4096, 32768, 131072), (1, 8, 32)
DEVICE = "cuda"

COLD_BYTES = 512 * 2**20
"""At least this much data is gone round: many times the cache of the chip."""


def side(*bands: tuple[int, int], outliers: int = 0) -> SideSpec:
    return SideSpec(tuple(Band(*band) for band in bands), outliers)


INSTANCES = {
    "16": (side((16, 128)), side((16, 128))),
    "8": (side((8, 128)), side((8, 128))),
    "8/4": (side((8, 128)), side((4, 128))),
    "4": (side((4, 128)), side((4, 128))),
    "4 outliers 1": (side((4, 128), outliers=1), side((4, 128), outliers=1)),
    "4/2": (side((4, 128)), side((2, 128))),
    "2": (side((2, 128)), side((2, 128))),
    "bands 3.5/2.75": (side((8, 16), (4, 64), (2, 48)), side((4, 48), (2, 80))),
    "rank 64 in 4": (side((4, 64)), side((4, 64))),
}

Step = Callable[[int], None]


def codec_of(k: SideSpec, v: SideSpec) -> HeadsCodec:
    def one(spec: SideSpec) -> SideCodec:
        basis_HDR = torch.linalg.qr(torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM))[0][..., : spec.rank].contiguous()
        scale_HR = torch.linspace(2, 0.3, spec.rank).expand(KV_HEADS, -1).contiguous()
        return SideCodec(spec, torch.randn(KV_HEADS, HEAD_DIM), basis_HDR, basis_HDR.mT.contiguous(), scale_HR)

    return HeadsCodec(one(k), one(v)).to(DEVICE)


class Cache:
    """One layer's cache, filled with random codes and gains around one, in `copies` copies."""

    def __init__(self, instance: str, context: int, batch: int) -> None:
        op = bind(codec_of(*INSTANCES[instance]), DEVICE)
        assert isinstance(op, CudaHeads)
        self.op, self.spec = op, op.plan.spec
        blocks = batch * -(-context // BLOCK_SIZE)
        self.bytes = batch * context * self.spec.bytes_per_token
        self.copies = max(1, -(-COLD_BYTES // self.bytes))
        self.pages = [self._filled(blocks) for _ in range(self.copies)]
        self.table_RN = torch.randperm(blocks, device=DEVICE).to(torch.int32).view(batch, -1)
        self.starts_R = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
        self.lengths_R = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)

    def call(self, batch: int) -> Call:
        """One query of each request."""
        query_THD = torch.randn(batch, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
        numbers = (self.table_RN, self.starts_R, self.lengths_R)
        return Call(torch.empty_like(query_THD), query_THD, *numbers, HEAD_DIM**-0.5, max_query_len=1)

    def _filled(self, blocks: int) -> Tensor:
        layout = PageLayout.of(self.spec, BLOCK_SIZE, FRAGMENT)
        pages_NHX = torch.randint(0, 256, (blocks, KV_HEADS, layout.record_bytes), dtype=torch.uint8, device=DEVICE)
        chunks = pages_NHX.unflatten(-1, (BLOCK_SIZE // CHUNK_TOKENS, -1))
        for place, spec in ((layout.k, self.spec.k), (layout.v, self.spec.v)):
            # Halves: gains, outliers, or all channels. The exponent byte 0x38 ... 0x3b is 0.5 to 1.
            parts = [(place.gain_offset, 2), (place.outlier_offset, 2 * spec.outliers)]
            if not spec.has_gain:
                parts = [(place.code_offset, spec.code_bytes)]
            for offset, width in parts:
                if offset >= 0:
                    part = chunks[..., offset : offset + CHUNK_TOKENS * width]
                    part[..., 1::2] = part[..., 1::2] % 4 + 0x38
        return pages_NHX


def kernel_step(cache: Cache, batch: int) -> Step:
    """The part of a decode step that grows with the context."""
    absorbed_THR = torch.randn(batch, HEADS, cache.spec.k.rank, device=DEVICE)
    call = cache.call(batch)

    def step(copy: int) -> None:
        cache.op.attend_latents(call, absorbed_THR, cache.pages[copy])

    return step


def whole_step(cache: Cache, batch: int) -> Step:
    """Everything from queries to outputs."""
    call = cache.call(batch)

    def step(copy: int) -> None:
        cache.op.attend(call, cache.pages[copy])

    return step


def measure(instance: str, context: int, batch: int) -> dict[str, Any]:
    cache = Cache(instance, context, batch)
    row = {"method": instance, "context": context, "batch": batch, "bytes": cache.bytes, "copies": cache.copies}
    return row | timed(kernel_step(cache, batch), whole_step(cache, batch), cache.copies)


def timed(kernel: Step, whole: Step, copies: int) -> dict[str, Any]:
    """A row's times: of the kernel, and of all from queries to outputs."""
    times = {"kernel": microseconds(kernel, copies), "whole": microseconds(whole, copies)}
    medians = {f"{name}_median_us": statistics.median(found) for name, found in times.items()}
    return {f"{name}_us": found for name, found in times.items()} | medians


def baselines(context: int, batch: int) -> list[dict[str, Any]]:
    """bf16 keys and values without pages, which no engine has: the best case."""
    size = 2 * batch * context * KV_HEADS * HEAD_DIM * 2
    copies = max(1, -(-COLD_BYTES // size))
    query_BHQD = torch.randn(batch, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    shape = (2, batch, KV_HEADS, context, HEAD_DIM)
    caches = [torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(copies)]

    def torch_step(backend: SDPBackend, as_queries: bool) -> Step:
        # The heads of a group as queries of one KV head need no mask for one token, and read keys once.
        query = query_BHQD.view(batch, KV_HEADS, -1, HEAD_DIM) if as_queries else query_BHQD

        def step(copy: int) -> None:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(query, *caches[copy], enable_gqa=not as_queries)

        return step

    steps: dict[str, Step] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        name = backend.name.split("_")[0].lower()
        steps[f"torch sdpa {name}, gqa"] = torch_step(backend, False)
        steps[f"torch sdpa {name}, heads as queries"] = torch_step(backend, True)
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        pass
    else:
        query_BQHD = query_BHQD.transpose(1, 2).contiguous()
        tokens_first = [cache.transpose(2, 3).contiguous() for cache in caches]

        def flash_step(copy: int) -> None:
            flash_attn_with_kvcache(query_BQHD, *tokens_first[copy])

        steps["flash-attn"] = flash_step
    rows = []
    for name, step in steps.items():
        row: dict[str, Any] = {"method": name, "context": context, "batch": batch, "bytes": size, "copies": copies}
        try:
            times = microseconds(step, copies)
        except RuntimeError as error:  # a backend that does not take this shape
            rows.append(row | {"refused": str(error).splitlines()[0]})
            continue
        rows.append(row | {"whole_us": times, "whole_median_us": statistics.median(times)})
    return rows


def encoding(batch: int = 32, prompt: int = 32768) -> list[dict[str, Any]]:
    """Storing one token of each request, and a prompt."""
    rows = []
    for instance in ("4", "bands 3.5/2.75"):
        cache = Cache(instance, prompt, 1)
        keys_THD, values_THD = torch.randn(2, prompt, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
        slots_T = torch.randperm(prompt, device=DEVICE)[:batch]
        blocks_N = cache.table_RN[0].long()
        some = (cache.pages[0], keys_THD[:batch], values_THD[:batch], slots_T)
        every = (cache.pages[0], keys_THD, values_THD, blocks_N)

        def store(_: int, op: CudaHeads = cache.op, rows: tuple[Tensor, Tensor, Tensor, Tensor] = some) -> None:
            op.append(*rows)

        def compress(_: int, op: CudaHeads = cache.op, rows: tuple[Tensor, Tensor, Tensor, Tensor] = every) -> None:
            op.compress(*rows)

        for what, step, tokens in (("append", store, batch), ("compress_pages", compress, prompt)):
            times = microseconds(step, 1)
            rows.append(
                {"what": what, "method": instance, "tokens": tokens, "us": times, "median_us": statistics.median(times)}
            )
    return rows
