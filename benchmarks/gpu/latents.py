"""MLA latents on this GPU: whether the kernels compute what float64 does, and how fast, by heads, context and batch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases.heads import relative_error
from benchmarks.cases.latent import SHAPES, Cache, bar, bind_pages
from benchmarks.gpu.graphs import capture
from benchmarks.gpu.sweep import BLOCK_SIZE, COLD_BYTES, Step
from benchmarks.gpu.timing import microseconds
from kvcompress.ops import gpu
from kvcompress.ops.call import Call
from kvcompress.ops.latent.cuda import CudaLatent

CHANNELS, RANK = 576, 512
HEADS = (16, 32, 128)
"""DeepSeek-V2-Lite; Llama-3.1-8B after TransMLA; DeepSeek-V3."""

DEVICE = "cuda"
"""A test runs these checks on the kernels' emulation."""


def checks(small: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check by its name; each raises AssertionError."""
    for channels, rank, heads in SHAPES[:1] if small else SHAPES:
        for dtype in (torch.bfloat16, torch.float16):
            name = f"latents: {channels} channels, {rank} of them values, {heads} heads, {dtype}"
            yield name, lambda shape=(channels, rank, heads), dtype=dtype: attention(*shape, dtype, small)  # type: ignore[misc]
    yield "latents: a prefill", lambda: prefill(*(12, 100) if small else (700, 1000))
    yield "latents: a graph replayed with other lengths", lambda: graph(300 if small else 3000)
    yield "latents: the same twice, and with other splits", lambda: repeated(300 if small else 3000)
    yield "latents: stored in slots", stored


def on_device(cache: Cache) -> Cache:
    cache.pages_NSC, cache.block_table_RN = cache.pages_NSC.to(DEVICE), cache.block_table_RN.to(DEVICE)
    return cache


def on_kernels(cache: Cache) -> CudaLatent:
    op = cache.op
    assert isinstance(op, CudaLatent)
    return op


def attend(cache: Cache, query_THC: Tensor, query_lens: list[int], rank: int) -> Tensor:
    call = cache.call(query_THC, query_lens, rank)
    on_kernels(cache).attend(call, cache.pages_NSC)
    return call.output_THD


def close(cache: Cache, found_THR: Tensor, query_THC: Tensor, query_lens: list[int]) -> None:
    expected_THR = cache.exact(query_THC.cpu(), query_lens, found_THR.shape[2])
    error = relative_error(found_THR.cpu(), expected_THR)
    assert error < bar(found_THR.dtype), f"relative error {error:.2e}"


def attention(channels: int, rank: int, heads: int, dtype: torch.dtype, small: bool) -> None:
    query_lens = [1, 1, 1, 2, 3]
    cache = on_device(Cache([1, 32, 33, 200, 450 if small else 4111], channels, dtype))
    query_THC = cache.query(sum(query_lens), heads, dtype).to(DEVICE)
    close(cache, attend(cache, query_THC, query_lens, rank), query_THC, query_lens)


def prefill(queries: int, cached: int) -> None:
    """More rows than a block has, from the beginning and behind cached tokens."""
    cache = on_device(Cache([queries, queries + cached], 576, torch.bfloat16))
    query_THC = cache.query(2 * queries, 16, torch.bfloat16).to(DEVICE)
    close(cache, attend(cache, query_THC, [queries] * 2, 512), query_THC, [queries] * 2)


def graph(longest: int) -> None:
    """Capture once, replay with other lengths and other blocks."""
    cache = on_device(Cache([longest, longest], 576, torch.bfloat16))
    query_THC = cache.query(2, 32, torch.bfloat16).to(DEVICE)
    output_THR = torch.empty(2, 32, 512, dtype=torch.bfloat16, device=DEVICE)
    table_RN = cache.block_table_RN.clone()
    starts_R = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
    lengths_R = torch.tensor(cache.seq_lens, dtype=torch.int32, device=DEVICE)

    op, call = on_kernels(cache), Call(output_THR, query_THC, table_RN, starts_R, lengths_R, 0.1, max_query_len=1)

    def step() -> None:
        op.attend(call, cache.pages_NSC)

    replay = capture(step, DEVICE)
    keys = cache.keys
    for lengths, order in (([longest, longest], [0, 1]), ([1, 200], [1, 0]), ([64, longest - 1], [0, 1])):
        lengths_R.copy_(torch.tensor(lengths))
        table_RN.copy_(cache.block_table_RN[order])
        output_THR.fill_(torch.nan)
        replay()
        cache.seq_lens = lengths
        cache.keys = [keys[one][:length] for one, length in zip(order, lengths, strict=True)]
        close(cache, output_THR, query_THC, [1, 1])


def repeated(longest: int) -> None:
    cache = on_device(Cache([longest, 77], 576, torch.bfloat16))
    query_THC = cache.query(2, 32, torch.bfloat16).to(DEVICE)
    first, second = attend(cache, query_THC, [1, 1], 512), attend(cache, query_THC, [1, 1], 512)
    assert torch.equal(first, second)
    for splits in (1, 2, 7, 100):
        call = cache.call(query_THC, [1, 1], 512)
        on_kernels(cache).attend(call, cache.pages_NSC, splits)
        assert relative_error(call.output_THD.cpu(), first.cpu().double()) < bar(first.dtype), f"{splits} splits"


def stored() -> None:
    """Also of an odd number of channels; padding and slots outside the cache are skipped."""
    kernels = gpu.kernels(torch.device(DEVICE))
    assert kernels is not None
    op = CudaLatent(kernels, torch.device(DEVICE))
    for channels, dtype in ((576, torch.bfloat16), (37, torch.float16), (40, torch.float32)):
        pages_NSC = torch.zeros(4, 16, channels, dtype=dtype, device=DEVICE)
        key_TC = torch.randn(5, channels).to(DEVICE, dtype)
        op.append(pages_NSC, key_TC, torch.tensor([40, -1, 3, 64, 63], device=DEVICE))
        expected_XC = torch.zeros(64, channels, dtype=dtype)
        expected_XC[[40, 3, 63]] = key_TC[[0, 2, 4]].cpu()
        assert torch.equal(pages_NSC.flatten(0, 1).cpu(), expected_XC)


def measure(heads: int, context: int, batch: int) -> list[dict[str, Any]]:
    """The kernel, torch's attention on latents without pages (the heads are queries of one KV head), and storing."""
    size = 2 * batch * context * CHANNELS
    copies = max(1, -(-COLD_BYTES // size))
    shape = (batch * -(-context // BLOCK_SIZE), BLOCK_SIZE, CHANNELS)
    pages = [torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(copies)]
    table_RN = torch.randperm(shape[0], device=DEVICE).to(torch.int32).view(batch, -1)
    starts_R = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
    lengths_R = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    query_THC = torch.randn(batch, heads, CHANNELS, dtype=torch.bfloat16, device=DEVICE)
    output_THR = torch.empty(batch, heads, RANK, dtype=torch.bfloat16, device=DEVICE)
    slots_T = torch.randperm(shape[0] * BLOCK_SIZE, device=DEVICE)[:batch]

    call = Call(output_THR, query_THC, table_RN, starts_R, lengths_R, CHANNELS**-0.5, max_query_len=1)
    op = bind_pages(pages[0])

    def own(copy: int) -> None:
        op.attend(call, pages[copy])

    def store(copy: int) -> None:
        op.append(pages[copy], query_THC[:, 0], slots_T)

    def torch_step(backend: SDPBackend) -> Step:
        def step(copy: int) -> None:
            keys = pages[copy].view(batch, 1, -1, CHANNELS)[:, :, :context]
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(query_THC[:, None], keys, keys[..., :RANK])

        return step

    steps: dict[str, Step] = {"latents": own, "append": store}
    for backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        steps[f"torch sdpa {backend.name.split('_')[0].lower()}"] = torch_step(backend)
    rows = []
    for name, step in steps.items():
        row: dict[str, Any] = {"method": name, "heads": heads, "context": context, "batch": batch}
        row |= {"bytes": 2 * batch * 2 * CHANNELS if name == "append" else size, "copies": copies}
        try:
            times = microseconds(step, copies)
        except RuntimeError as error:  # a backend that does not take this shape
            rows.append(row | {"refused": str(error).splitlines()[0]})
            continue
        rows.append(row | {"us": times, "median_us": statistics.median(times)})
    return rows


def print_rows(rows: list[dict[str, Any]], read: float) -> None:
    """One shape: time, share of the read bandwidth and products per second, speed-up over the best of torch's."""
    timed = [row for row in rows if "median_us" in row]
    best = min((row["median_us"] for row in timed if row["method"].startswith("torch")), default=None)
    heads, context, batch = (rows[0][name] for name in ("heads", "context", "batch"))
    print(f"latents, {heads} heads, context {context}, batch {batch}:   us   % of read   TFLOP/s   over torch")
    for row in timed:
        seconds = row["median_us"] / 1e6
        share = 100 * row["bytes"] / seconds / read
        line = f"  {row['method']:<30}{row['median_us']:10.1f}{share:12.1f}"
        if row["method"] != "append":
            line += f"{2 * heads * context * batch * (CHANNELS + RANK) / seconds / 1e12:10.1f}"
            line += f"{best / row['median_us']:12.2f}x" if best else ""
        print(line, flush=True)
