"""Latents that layers share on this GPU: whether the kernels compute what float64 does, and how fast they do."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.heads import POISON, bands, relative_error
from benchmarks.cases.shared import CUDA_SIDES, HALVES_BAR, Group, a_group
from benchmarks.gpu.graphs import capture
from benchmarks.gpu.sweep import BLOCK_SIZE, COLD_BYTES, HEAD_DIM, HEADS, KV_HEADS, Step
from benchmarks.gpu.timing import microseconds
from kvcompress.codec.bands import SideSpec
from kvcompress.codec.rope import Rope
from kvcompress.codec.shared.codec import SharedCodec, SharedSide
from kvcompress.codec.shared.pages import SharedLayout
from kvcompress.codec.shared.spec import SharedSpec
from kvcompress.ops.shared.attention import bind
from kvcompress.ops.shared.call import SharedCall
from kvcompress.ops.shared.cuda import CudaShared
from kvcompress.ops.shared.reference import SharedOp

LAYERS = 4
INSTANCES = {
    "8": (bands((8, 96)), bands((8, 144))),
    "4": (bands((4, 96)), bands((4, 144))),
    "16": (bands((16, 96)), bands((16, 144))),
}
"""Stripes of groups of four layers, as the paper has them for Llama-3.1-8B: ranks 384 and 576."""

DEVICE = "cuda"
"""A test runs these checks on the kernels' emulation."""


def checks(small: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check by its name; each raises AssertionError."""
    for share in ("kv", "v"):
        for k, v in CUDA_SIDES[3:4] if small else [*CUDA_SIDES, *INSTANCES.values()]:
            name = f"shared {share}: attention, {_title(k)} and {_title(v)}"
            yield name, lambda k=k, v=v, share=share: attention(k, v, share, small)  # type: ignore[misc]
        yield f"shared {share}: the same twice, and with other splits", lambda share=share: repeated(share)  # type: ignore[misc]
        yield f"shared {share}: a graph replayed with other lengths", lambda share=share: graph(share, small)  # type: ignore[misc]
    yield "shared: stored in slots", stored


def _title(side: SideSpec) -> str:
    return f"{side.rank} channels in {8 * side.code_bytes / side.rank:g} bits"


def on_kernels(codec: SharedCodec) -> CudaShared:
    op = bind(codec, DEVICE)
    assert isinstance(op, CudaShared)
    return op


def attend(group: Group, splits: tuple[int, int] | None = None) -> Tensor:
    """With numbers on the device."""
    call = group.call(max(group.query_lens)).on(DEVICE)
    on_kernels(group.codec).attend_few(call, splits)
    return call.output_THD


def close(group: Group, found_THD: Tensor) -> None:
    error = relative_error(found_THD.cpu(), group.exact())
    assert error < HALVES_BAR, f"relative error {error:.2e}"


def attention(k: SideSpec, v: SideSpec, share: str, small: bool) -> None:
    """Also with more queries than the kernels take, which go to torch."""
    shape = (2, 32, 8) if small else (KV_HEADS, HEAD_DIM, HEADS)
    k = bands((8, 24)) if share == "v" and k.rank > shape[1] else k
    lengths = [1, 64, 200, 90] if small else [1, 63, 64, 65, 1000, 4111]
    queries = [1, 1, 3, 70] if small else [1, 1, 1, 3, 70, 2]
    group = a_group(k, v, lengths, queries, share, LAYERS, *shape).to(DEVICE)
    call = group.call()
    on_kernels(group.codec).attend(call)
    close(group, call.output_THD)


def repeated(share: str) -> None:
    group = a_group(*CUDA_SIDES[0], [3000, 77], [1, 2], share).to(DEVICE)
    first = attend(group)
    close(group, first)
    assert torch.equal(first, attend(group))
    for splits in ((1, 1), (2, 7), (100, 100)):
        assert relative_error(attend(group, splits).cpu(), first.cpu().double()) < 2e-4, f"{splits} splits"


def graph(share: str, small: bool) -> None:
    """Capture once, replay with other lengths."""
    longest = 300 if small else 3000
    group = a_group(*CUDA_SIDES[3], [longest, longest], [1, 1], share).to(DEVICE)
    op, call = on_kernels(group.codec), group.call(1).on(DEVICE)

    def step() -> None:
        op.attend(call)

    replay = capture(step, DEVICE)
    # Keys of the layer's own are attended as stored, so a request's newest token is where it was: the length stays.
    for lengths in ([longest, longest], [2, 200], [64, longest - 1]) if share == "kv" else ([longest, longest],):
        call.seq_lens.copy_(torch.tensor(lengths))
        call.stored_lens.copy_(torch.tensor(lengths) - 1)
        call.output_THD.fill_(torch.nan)
        replay()
        decoded = [
            tuple(torch.cat([side[: length - 1], side[-1:]]) for side in sides)
            for length, sides in zip(lengths, group.decoded, strict=True)
        ]
        close(replace(group, seq_lens=lengths, decoded=decoded), call.output_THD)


def stored() -> None:
    codec = a_group(*CUDA_SIDES[0], [20], [1]).codec
    for spec in (bands((8, 96)), bands((8, 8), (4, 8), (2, 8)), bands((16, 24)), bands((4, 520))):
        latent_THR = torch.randn(50, 3, spec.rank, generator=torch.Generator().manual_seed(3))
        weight_HR = torch.linspace(2, 0.3, spec.rank).expand(3, -1)
        slots_T = torch.randperm(96)[:50]
        slots_T[7] = -1
        found, expected = torch.full((2, 6, 3, 16, spec.bytes_per_token), POISON, dtype=torch.uint8)
        SharedOp(codec).store(expected, spec, latent_THR, weight_HR, slots_T)
        found = found.to(DEVICE)
        bind(codec, DEVICE).store(found, spec, *(each.to(DEVICE) for each in (latent_THR, weight_HR, slots_T)))
        differing = float((found.cpu() != expected).float().mean())
        assert differing < 5e-3, f"{differing:.1%} of the bytes differ"


def a_layer(instance: str) -> SharedCodec:
    k, v = INSTANCES[instance]
    spec = SharedSpec(KV_HEADS, HEAD_DIM, tuple(range(LAYERS)), 0, "kv", k, v)

    def side(spec: SideSpec) -> SharedSide:
        rank = LAYERS * spec.rank
        basis_HDR = torch.randn(KV_HEADS, HEAD_DIM, rank)
        scale_WR = torch.linspace(2, 0.3, rank).view(LAYERS, -1)
        return SharedSide(spec, torch.randn(KV_HEADS, HEAD_DIM), basis_HDR, basis_HDR.mT / rank**0.5, scale_WR)

    rope = Rope(500000.0 ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)), torch.ones(1))
    return SharedCodec(spec, side(k), side(v), rope).to(DEVICE)


def pages_of(layout: SharedLayout, blocks: int) -> Tensor:
    """Random codes, and gains around one: the exponent byte 0x38 ... 0x3b is 0.5 to 1."""
    pages_NX = torch.randint(0, 256, (blocks, layout.page_bytes), dtype=torch.uint8, device=DEVICE)
    for part in (layout.k, layout.v):
        tokens = part.view(pages_NX)
        halves = tokens[..., :2] if part.spec.has_gain else tokens
        halves[..., 1::2] = halves[..., 1::2] % 4 + 0x38
    return pages_NX


def measure(instance: str, context: int, batch: int) -> dict[str, Any]:
    """A decode step of one layer, which reads the stripes of all four, and storing its token's stripe."""
    codec = a_layer(instance)
    op, layout = bind(codec, DEVICE), SharedLayout.of(codec.spec, BLOCK_SIZE)
    blocks = batch * -(-context // BLOCK_SIZE)
    size = LAYERS * batch * context * codec.spec.bytes_per_token
    copies = max(1, -(-COLD_BYTES // size))
    pages = [[pages_of(layout, blocks) for _ in range(LAYERS)] for _ in range(copies)]
    tables = [torch.randperm(blocks, device=DEVICE).to(torch.int32).view(batch, -1) for _ in range(LAYERS)]
    starts_R = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE)
    lengths_R = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    numbers = (tables, tables, starts_R, lengths_R, lengths_R - 1, starts_R[:-1])
    query_THD = torch.randn(batch, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    own_THD = torch.randn(batch, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    output_THD = torch.empty_like(query_THD)
    latent_THR = torch.randn(batch, 1, codec.spec.k.rank, device=DEVICE)
    slots_T = torch.randperm(blocks * BLOCK_SIZE, device=DEVICE)[:batch]

    def step(copy: int) -> None:
        records = [[part.view(each) for each in pages[copy]] for part in (layout.k, layout.v)]
        op.attend(SharedCall(output_THD, query_THD, own_THD, own_THD, *records, *numbers, HEAD_DIM**-0.5, 1))

    def store(copy: int) -> None:
        records = layout.k.view(pages[copy][0])
        op.store(records, codec.spec.k, latent_THR, codec.shared_sides["k"].weight_WR[:1], slots_T)

    steps: dict[str, Step] = {"attend": step, "store": store}
    row: dict[str, Any] = {"method": f"shared {instance}", "context": context, "batch": batch}
    row |= {
        "bytes": size,
        "copies": copies,
        "flops": 2 * batch * context * LAYERS * codec.spec.k.rank * KV_HEADS * HEAD_DIM,
    }
    for name, call in steps.items():
        times = microseconds(call, copies)
        row |= {f"{name}_us": times, f"{name}_median_us": statistics.median(times)}
    return row


def print_row(row: dict[str, Any], read: float) -> None:
    """Time of a step, its share of the read bandwidth, and products of expanding keys per second."""
    seconds = row["attend_median_us"] / 1e6
    print(
        f"  {row['method']}, context {row['context']}, batch {row['batch']}: {row['attend_median_us']:.1f} us, "
        f"{100 * row['bytes'] / seconds / read:.1f} % of read, {row['flops'] / seconds / 1e12:.1f} TFLOP/s; "
        f"store {row['store_median_us']:.1f} us",
        flush=True,
    )
