"""The form `blocks` (GEAR) on this GPU: whether the kernels compute what float64 does, and how fast."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.blocks import Batch, random_batch, random_codec
from benchmarks.cases.blocks_sides import BAR, SHAPES, cuda_sides, random_query
from benchmarks.cases.heads import relative_error
from benchmarks.gpu.graphs import capture
from benchmarks.gpu.sweep import COLD_BYTES, HEAD_DIM, HEADS, KV_HEADS, Step, timed
from kvcompress.codec.blocks.codec import BlocksCodec, BlockSideCodec
from kvcompress.codec.blocks.spec import BlockSide
from kvcompress.codec.layout import CHUNK_TOKENS
from kvcompress.ops.blocks.attention import bind
from kvcompress.ops.blocks.cuda import CudaBlocks
from kvcompress.ops.call import Call

OUTLIERS = 168
"""Two in a hundred."""

INSTANCES = {
    "gear 4": cuda_sides(HEAD_DIM, 4, outliers=OUTLIERS),
    "gear 4/2": cuda_sides(HEAD_DIM, 4, v_bits=2, outliers=OUTLIERS),
    "gear 2": cuda_sides(HEAD_DIM, 2, outliers=OUTLIERS),
    "gear 4 without outliers": cuda_sides(HEAD_DIM, 4, outliers=0),
    "gear 2 without outliers": cuda_sides(HEAD_DIM, 2, outliers=0),
}

PLACES = CHUNK_TOKENS + 1
DEVICE = "cuda"
"""A test runs these checks on the kernels' emulation."""


def checks(small: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check by its name; each raises AssertionError."""
    for head_dim, (k, v) in SHAPES[3:4] if small else SHAPES:
        name = f"blocks: {k.rank}x{k.bits} and {v.rank}x{v.bits}, rank {k.low_rank}, {k.outliers} outliers"
        yield name, lambda head_dim=head_dim, specs=(k, v): attention(head_dim, specs, small)  # type: ignore[misc]
    yield "blocks: sealed and kept on the device", stored
    yield "blocks: a graph replayed with other lengths", lambda: graph(300 if small else 3000)
    yield "blocks: the same twice, and with other splits", lambda: repeated(300 if small else 3000)


def on_device(batch: Batch) -> Batch:
    op = bind(batch.op.plan.codec, DEVICE)
    assert op.on_kernels
    tensors = (batch.pages_NHMB.to(DEVICE), batch.rings_NHXPD.to(DEVICE), batch.ring_R, batch.block_table_RN.to(DEVICE))
    histories = [(keys.to(DEVICE), values.to(DEVICE)) for keys, values in batch.histories]
    return Batch(op, *tensors, histories, batch.query_lens)


def batch_of(
    specs: tuple[BlockSide, BlockSide], lengths: list[int], query_lens: list[int], head_dim: int = 128
) -> Batch:
    return random_batch(random_codec(2, head_dim, specs), lengths, query_lens)


def close(host: Batch, found: tuple[Tensor, Tensor], query_THD: Tensor) -> None:
    expected_THD, expected_TH = host.exact(query_THD)
    error = relative_error(found[0].cpu(), expected_THD)
    assert error < BAR, f"relative error {error:.2e}"
    torch.testing.assert_close(found[1].cpu().double(), expected_TH, rtol=1e-4, atol=2e-3)


def attention(head_dim: int, specs: tuple[BlockSide, BlockSide], small: bool) -> None:
    lengths = [1, 64, 200] if small else [1, 63, 64, 65, 1000, 4111]
    host = batch_of(specs, lengths, [1] * (len(lengths) - 1) + [3], head_dim)
    query_THD = random_query(sum(host.query_lens), 8, head_dim)
    close(host, on_device(host).attend(query_THD.to(DEVICE)), query_THD)


def stored() -> None:
    """A prompt and steps after it, stored by the operations: what they leave is what attention reads."""
    host = batch_of(INSTANCES["gear 4"], [300, 140], [1, 1])
    device = on_device(host)
    device.pages_NHMB.fill_(255)
    device.rings_NHXPD.fill_(torch.nan)
    ring_R = torch.tensor(host.ring_R, dtype=torch.int32, device=DEVICE)
    at = [0, 0]
    for counts in ([250, 100], [1, 40], [49, 0]):
        at = [done + count for done, count in zip(at, counts, strict=True)]
        seen = [(keys[:n], values[:n]) for (keys, values), n in zip(device.histories, at, strict=True)]
        step = replace(device, histories=seen, query_lens=counts)
        written = (device.pages_NHMB, device.rings_NHXPD, ring_R)
        call, *found = step.call(random_query(sum(counts), 8, 128).to(DEVICE))
        step.op.seal(call, *step.tokens, *written)
        step.op.attend(call, *step.tokens, *written)
        step.op.keep(call, *step.tokens, *written[1:])
        exact = replace(host, pages_NHMB=device.pages_NHMB.cpu(), query_lens=counts)
        exact.histories = [(keys.cpu(), values.cpu()) for keys, values in seen]
        close(exact, (found[0], found[1]), random_query(sum(counts), 8, 128))


def graph(longest: int) -> None:
    """Capture once, replay with other lengths, other blocks and other rings."""
    host = batch_of(INSTANCES["gear 4"], [longest, longest], [1, 1])
    device, query_THD = on_device(host), random_query(2, 8, 128)
    query, output_THD, lse_TH = (
        query_THD.to(DEVICE),
        torch.empty(2, 8, 128, device=DEVICE),
        torch.empty(2, 8, device=DEVICE),
    )
    rows = (device.newest(0).clone(), device.newest(1).clone())
    table_RN, ring_R = device.block_table_RN.clone(), torch.tensor(host.ring_R, dtype=torch.int32, device=DEVICE)
    starts_R, lengths_R = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in ([0, 1, 2], host.seq_lens))

    def step() -> None:
        call = Call(output_THD, query, table_RN, starts_R, lengths_R, 128**-0.5, lse_TH, 1)
        device.op.attend(call, *rows, device.pages_NHMB, device.rings_NHXPD, ring_R)

    replay = capture(step, DEVICE)
    # Where a block ends, only the step's own token and complete blocks count: rings hold what the longest left.
    for lengths, order in (([longest, longest], [0, 1]), ([1, 193], [1, 0]), ([64, 257], [0, 1])):
        lengths_R.copy_(torch.tensor(lengths))
        table_RN.copy_(device.block_table_RN[order])
        ring_R.copy_(torch.tensor([host.ring_R[one] for one in order]))
        replayed = replace(host, block_table_RN=host.block_table_RN[order], ring_R=[host.ring_R[one] for one in order])
        replayed.histories = [
            (keys[:n], values[:n])
            for (keys, values), n in zip([host.histories[one] for one in order], lengths, strict=True)
        ]
        for own, newest in zip(rows, (replayed.newest(0), replayed.newest(1)), strict=True):
            own.copy_(newest)
        output_THD.fill_(torch.nan)
        replay()
        close(replayed, (output_THD, lse_TH), query_THD)


def repeated(longest: int) -> None:
    host = batch_of(INSTANCES["gear 2"], [longest, 77], [1, 1])
    device, query_THD = on_device(host), random_query(2, 8, 128).to(DEVICE)
    first, second = device.attend(query_THD), device.attend(query_THD)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    for splits in (1, 2, 7, 100):
        output_THD, _ = device.attend(query_THD, splits=splits)
        assert relative_error(output_THD.cpu(), first[0].cpu().double()) < 5e-4, f"{splits} splits"


class Cache:
    """One layer's cache, filled with random codes, scales around one and outliers anywhere, in `copies` copies."""

    def __init__(self, instance: str, context: int, batch: int) -> None:
        specs = INSTANCES[instance]
        op = bind(codec_of(specs), DEVICE)
        assert isinstance(op, CudaBlocks)
        self.op, spec = op, op.plan.spec
        count = batch * -(-context // CHUNK_TOKENS)
        self.bytes = batch * context * spec.bytes_per_token
        self.copies = max(1, -(-COLD_BYTES // self.bytes))
        self.pages = [self._filled(count) for _ in range(self.copies)]
        self.table_RN = torch.randperm(count, device=DEVICE).to(torch.int32).view(batch, -1)
        self.starts_R = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
        self.lengths_R = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
        self.ring_R = torch.arange(batch, dtype=torch.int32, device=DEVICE)
        shape = (batch, KV_HEADS, 2, PLACES, HEAD_DIM)
        self.rings_NHXPD = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)

    def call(self, batch: int) -> Call:
        """One query of each request."""
        query_THD = torch.randn(batch, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
        numbers = (self.table_RN, self.starts_R, self.lengths_R)
        return Call(torch.empty_like(query_THD), query_THD, *numbers, HEAD_DIM**-0.5, max_query_len=1)

    def _filled(self, count: int) -> Tensor:
        spec, some = self.op.plan.spec, 256
        records = torch.randint(0, 256, (some, spec.record_bytes), dtype=torch.uint8, device=DEVICE)
        at = 0
        for side in (spec.k, spec.v):
            for name, size in side.parts().items():
                part = records[:, at : at + size]
                if name == "outlier_places":
                    order = torch.rand(some, CHUNK_TOKENS * side.rank, device=DEVICE).argsort(-1)
                    place = order[:, : side.outliers].sort(-1).values.to(torch.int16)
                    part.copy_(place.contiguous().view(torch.uint8))
                elif name != "codes":  # halves; the exponent byte 0x38 ... 0x3b is 0.5 to 1
                    part[:, 1::2] = part[:, 1::2] % 4 + 0x38
                at += size
        chosen = torch.randint(0, some, (count, KV_HEADS), device=DEVICE)
        return records[chosen].view(count, KV_HEADS, 1, spec.record_bytes)


def codec_of(specs: tuple[BlockSide, BlockSide]) -> BlocksCodec:
    def side(spec: BlockSide) -> BlockSideCodec:
        basis_HDR = torch.linalg.qr(torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM))[0][..., : spec.rank].contiguous()
        scale_HR = torch.linspace(2, 0.3, spec.rank).repeat(KV_HEADS, 1)
        return BlockSideCodec(spec, torch.randn(KV_HEADS, HEAD_DIM), basis_HDR, basis_HDR.mT.contiguous(), scale_HR)

    return BlocksCodec(side(specs[0]), side(specs[1])).to(DEVICE)


def kernel_step(cache: Cache, batch: int) -> Step:
    """The part of a decode step that grows with the context."""
    absorbed_THR = torch.randn(batch, HEADS, cache.op.plan.spec.k.rank, device=DEVICE)
    call = cache.call(batch)

    def step(copy: int) -> None:
        cache.op.attend_blocks(call, absorbed_THR, cache.pages[copy])

    return step


def whole_step(cache: Cache, batch: int) -> Step:
    """Everything from queries to outputs, and keeping the step's tokens; no block is complete in it."""
    call = cache.call(batch)
    own = torch.randn(2, batch, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE).unbind()

    def step(copy: int) -> None:
        cache.op.attend(call, *own, cache.pages[copy], cache.rings_NHXPD, cache.ring_R)
        cache.op.keep(call, *own, cache.rings_NHXPD, cache.ring_R)

    return step


def measure(instance: str, context: int, batch: int) -> dict[str, Any]:
    """As `sweep.measure`; and how long a layer takes to compress a block of every request, which is not captured."""
    cache = Cache(instance, context, batch)
    row = {"method": instance, "context": context, "batch": batch, "bytes": cache.bytes, "copies": cache.copies}
    row |= timed(kernel_step(cache, batch), whole_step(cache, batch), cache.copies)
    return row | {"seal_us": seal_microseconds(cache, batch)}


def seal_microseconds(cache: Cache, batch: int, repeats: int = 5) -> float:
    """Of one layer, when a token completes a block of every request, by the clock between events."""
    own = torch.randn(2, batch, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE).unbind()
    call = cache.call(batch)
    call.query_starts, call.seq_lens = list(range(batch + 1)), [CHUNK_TOKENS] * batch
    times = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        cache.op.seal(call, *own, cache.pages[0], cache.rings_NHXPD, cache.ring_R)
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return statistics.median(times[1:])
