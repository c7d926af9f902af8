"""Decode attention of one Llama-3.1-8B layer on the CPU: compressed pages against vLLM's bf16 op and torch's SDPA.

    python benchmarks/cpu_decode.py [--contexts 1024 4096 32768] [--batches 1 4] [--threads 2] [--note "..."]
    python benchmarks/cpu_decode.py --forms latents   (MLA and xkv, on their kernels and on the torch code before them)
    python benchmarks/cpu_decode.py --forms blocks    (GEAR, the same)

One repetition times every method once, one after the other, so that other load on the machine falls on all of them;
ratios are taken within a repetition and their median is reported. A model has many layers, so a step finds its cache in
memory, not in the processor: each method goes round enough copies of the cache to exceed the last-level cache.
CPU time (all threads) is recorded beside wall time, because wall time on a shared machine measures its neighbours, too.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import latent_steps
import torch
from torch import Tensor

from kvcompress.codec.bands import Band, SideSpec
from kvcompress.codec.blocks.codec import BlocksCodec, BlockSideCodec
from kvcompress.codec.blocks.spec import Axis, BlockSide
from kvcompress.codec.heads.codec import HeadsCodec, SideCodec
from kvcompress.codec.heads.layout import PageLayout
from kvcompress.ops import library
from kvcompress.ops.blocks.attention import bind as bind_blocks
from kvcompress.ops.blocks.reference import BlocksOp
from kvcompress.ops.call import Call
from kvcompress.ops.heads.attention import bind
from kvcompress.ops.heads.reference import HeadsOp

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
BITS = (16, 8, 4, 2)
BLOCK_BITS = (4, 2)
BLOCK = 64
"""Tokens that the form `blocks` compresses together, here with GEAR's rank 2 and 2 % outliers."""

BLOCK_SIZE = 128
"""vLLM's default on the CPU, for both."""

COLD_BYTES = 256 * 2**20
"""bf16 cache bytes to go round: several last-level caches."""

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--without-vllm", action="store_true")
    parser.add_argument("--forms", choices=("heads", "blocks", "latents"), default="heads", help="caches to measure")
    parser.add_argument("--without-torch-code", action="store_true", help="leave out what kernels have replaced: slow")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if library.load() is None:
        sys.exit("error: no compiled kernels; install kvcompress with a C++ compiler or set KVCOMPRESS_LIBRARY")
    rows = []
    for batch in args.batches:
        for context in args.contexts:
            row = measure(context, batch, args)
            rows.append(row)
            print(line(row), flush=True)
    result = {
        "what": "decode attention, one Llama-3.1-8B layer",
        "forms": args.forms,
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "block_size": BLOCK_SIZE},
        "machine": machine(args.threads),
        "note": args.note,
        "load_average_after": os.getloadavg(),
        "rows": rows,
        "linear_fit_r2": linear_fits(rows),
    }
    suffix = "" if args.forms == "heads" else f"-{args.forms}"
    path = RESULTS / f"{datetime.date.today()}-{machine_name()}-cpu-decode{suffix}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


def measure(context: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Every method's samples at one context and batch, in seconds per decode step of one layer."""
    gc.collect()
    copies = max(1, -(-COLD_BYTES // (4 * KV_HEADS * HEAD_DIM * context * batch)))
    query_THD = torch.randn(batch, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    if args.forms == "heads":
        methods = {f"{bits}-bit": compressed_step(bits, context, batch, copies, query_THD) for bits in BITS}
        methods["append 4-bit"] = append_step(4, context, batch, copies)
    elif args.forms == "blocks":
        methods = {}
        for bits in BLOCK_BITS:
            steps = block_steps(bits, context, batch, copies, query_THD)
            methods[f"gear {bits}-bit"], methods[f"gear {bits}-bit{latent_steps.IN_TORCH}"] = steps
    else:
        methods = latent_methods(context, batch, copies, query_THD)
    if args.without_torch_code:
        methods = {name: step for name, step in methods.items() if not name.endswith(latent_steps.IN_TORCH)}
    methods["torch sdpa bf16"] = sdpa_step(context, batch, copies, query_THD)
    baseline = "torch sdpa bf16"
    if not args.without_vllm:
        baseline = "vllm cpu_attn bf16"
        methods[baseline] = vllm_step(context, batch, copies, query_THD)
    wall: dict[str, list[float]] = {name: [] for name in methods}
    cpu: dict[str, list[float]] = {name: [] for name in methods}
    for repetition in range(args.repetitions + 1):
        for name, step in methods.items():
            # Torch code that kernels have replaced is far from waiting for memory.
            turns = 1 if name.endswith(latent_steps.IN_TORCH) else copies
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            for copy in range(turns):
                step(copy)
            cpu_seconds, wall_seconds = time.process_time() - cpu_start, time.perf_counter() - wall_start
            if repetition:  # the first one warms up
                wall[name].append(wall_seconds / turns)
                cpu[name].append(cpu_seconds / turns)
    return {
        "context": context,
        "batch": batch,
        "copies": copies,
        "baseline": baseline,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "median_wall_ms": {name: 1e3 * statistics.median(samples) for name, samples in wall.items()},
        "speedup_wall": ratios(wall, baseline),
        "speedup_cpu": ratios(cpu, baseline),
    }


def latent_methods(context: int, batch: int, copies: int, query_THD: Tensor) -> dict[str, Callable[[int], None]]:
    table_RN = block_table(context, batch)
    methods = latent_steps.mla_steps(HEADS, context, table_RN, BLOCK_SIZE, copies)
    for share in ("kv", "v"):
        for bits in (8, 4):
            methods |= latent_steps.shared_steps(
                bits, share, query_THD, KV_HEADS, context, table_RN, BLOCK_SIZE, copies
            )
    return methods


def ratios(samples: dict[str, list[float]], baseline: str) -> dict[str, float]:
    """Median over repetitions of baseline's time over the method's."""
    return {
        name: statistics.median(base / own for base, own in zip(samples[baseline], times, strict=True))
        for name, times in samples.items()
    }


def line(row: dict[str, Any]) -> str:
    wall, cpu, times = row["speedup_wall"], row["speedup_cpu"], row["median_wall_ms"]
    parts = [f"{name} {times[name]:.2f} ms (x{wall[name]:.2f}, cpu x{cpu[name]:.2f})" for name in times]
    return f"context {row['context']} batch {row['batch']}: " + "; ".join(parts)


def linear_fits(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """R^2 of time against context from 4K on, batch 1: the cost of a token must not grow with what came before.

    Wall time is what counts on a quiet machine, CPU time on a busy one; it has the time in which threads wait for work.
    """
    chosen = [row for row in rows if row["batch"] == 1 and row["context"] >= 4096]
    if len(chosen) < 3:
        return {}
    contexts = [float(row["context"]) for row in chosen]
    names = [name for name in chosen[0]["wall_seconds"] if not name.startswith("append")]

    def fit(clock: str, name: str) -> float:
        times = [statistics.median(row[f"{clock}_seconds"][name]) for row in chosen]
        return statistics.correlation(contexts, times) ** 2

    return {clock: {name: fit(clock, name) for name in names} for clock in ("wall", "cpu")}


def codec_of(bits: int) -> HeadsCodec:
    spec = SideSpec((Band(bits, HEAD_DIM),))

    def side() -> SideCodec:
        basis_HDR = torch.linalg.qr(torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM))[0].contiguous()
        scale_HR = torch.linspace(2, 0.3, HEAD_DIM).expand(KV_HEADS, -1).contiguous()
        return SideCodec(spec, torch.randn(KV_HEADS, HEAD_DIM), basis_HDR, basis_HDR.mT.contiguous(), scale_HR)

    return HeadsCodec(side(), side())


def block_table(context: int, batch: int) -> Tensor:
    blocks = -(-context // BLOCK_SIZE)
    return torch.randperm(batch * blocks).to(torch.int32).view(batch, blocks)


def compressed_pages(bits: int, context: int, batch: int) -> tuple[HeadsOp, Tensor]:
    op = bind(codec_of(bits), "cpu")
    slots = batch * -(-context // BLOCK_SIZE) * BLOCK_SIZE
    record_bytes = PageLayout.of(op.plan.spec, BLOCK_SIZE).record_bytes
    pages_NHX = torch.zeros(slots // BLOCK_SIZE, KV_HEADS, record_bytes, dtype=torch.uint8)
    for start in range(0, slots, 4096):
        tokens = min(4096, slots - start)
        keys_THD, values_THD = torch.randn(2, tokens, KV_HEADS, HEAD_DIM)
        op.append(pages_NHX, keys_THD, values_THD, torch.arange(start, start + tokens))
    return op, pages_NHX


def compressed_step(bits: int, context: int, batch: int, copies: int, query_THD: Tensor) -> Callable[[int], None]:
    op, pages_NHX = compressed_pages(bits, context, batch)
    caches = [pages_NHX] + [pages_NHX.clone() for _ in range(copies - 1)]
    table_RN = block_table(context, batch)
    starts_R = torch.arange(batch + 1, dtype=torch.int32)
    lengths_R = torch.full((batch,), context, dtype=torch.int32)
    output_THD = torch.empty_like(query_THD)

    def step(copy: int) -> None:
        op.attend(Call(output_THD, query_THD, table_RN, starts_R, lengths_R, HEAD_DIM**-0.5), caches[copy])

    return step


def append_step(bits: int, context: int, batch: int, copies: int) -> Callable[[int], None]:
    """Storing one new token per request: what a decode step does beside attention."""
    op = bind(codec_of(bits), "cpu")
    record_bytes = PageLayout.of(op.plan.spec, BLOCK_SIZE).record_bytes
    caches = torch.zeros(copies, batch, KV_HEADS, record_bytes, dtype=torch.uint8)
    keys_THD, values_THD = torch.randn(2, batch, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    slots_T = torch.arange(batch) * BLOCK_SIZE

    def step(copy: int) -> None:
        op.append(caches[copy], keys_THD, values_THD, slots_T)

    return step


def block_codec_of(bits: int) -> BlocksCodec:
    def side(axis: Axis) -> BlockSideCodec:
        spec = BlockSide(BLOCK, HEAD_DIM, bits, axis, 64, low_rank=2, iterations=3, outliers=168)
        scalar = codec_of(bits).k
        return BlockSideCodec(spec, scalar.mean_HD, scalar.basis_HDR, scalar.inverse_HRD, scalar.scale_HR)

    return BlocksCodec(side("tokens"), side("channels"))


def block_steps(
    bits: int, context: int, batch: int, copies: int, query_THD: Tensor
) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """Form `blocks`, by the kernels and by the torch code. The newest block is half full, its tokens in a ring."""
    codec = block_codec_of(bits)
    per_page = BLOCK_SIZE // BLOCK
    length = context - BLOCK // 2
    keys_THD, values_THD = torch.randn(2, BLOCK * min(64, length // BLOCK), KV_HEADS, HEAD_DIM)
    records_NHB = codec.seal(keys_THD, values_THD)
    pages = batch * -(-context // BLOCK_SIZE)
    # Some blocks, again and again: what they hold does not change what they take.
    number = torch.arange(pages * per_page) % records_NHB.shape[0]
    cache_NHMB = records_NHB[number].unflatten(0, (pages, per_page)).transpose(1, 2).contiguous()
    caches = [cache_NHMB] + [cache_NHMB.clone() for _ in range(copies - 1)]
    rings_NHXPD = torch.randn(batch, KV_HEADS, 2, BLOCK + 1, HEAD_DIM, dtype=torch.bfloat16)
    newest_THD = torch.randn(batch, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    table_RN = block_table(context, batch)
    rings, starts, lengths = list(range(batch)), list(range(batch + 1)), [length] * batch
    output_THD = torch.empty_like(query_THD)

    def step_of(op: BlocksOp) -> Callable[[int], None]:
        def step(copy: int) -> None:
            call = Call(output_THD, query_THD, table_RN, starts, lengths, HEAD_DIM**-0.5)
            op.attend(call, newest_THD, newest_THD, caches[copy], rings_NHXPD, rings)

        return step

    return step_of(bind_blocks(codec, "cpu")), step_of(BlocksOp(codec))


def sdpa_step(context: int, batch: int, copies: int, query_THD: Tensor) -> Callable[[int], None]:
    """Contiguous bf16 keys and values, which no paged engine has: the best case. The query heads of a group become
    queries of its KV head (one token sees all keys, so no mask): torch's own enable_gqa is several times slower."""
    cache = torch.randn(2, batch, KV_HEADS, context, HEAD_DIM, dtype=torch.bfloat16)
    caches = [cache] + [cache.clone() for _ in range(copies - 1)]
    query_BHGD = query_THD.unflatten(1, (KV_HEADS, -1))

    def step(copy: int) -> None:
        keys_BHTD, values_BHTD = caches[copy]
        torch.nn.functional.scaled_dot_product_attention(query_BHGD, keys_BHTD, values_BHTD)

    return step


def vllm_step(context: int, batch: int, copies: int, query_THD: Tensor) -> Callable[[int], None]:
    from kvcompress.serving.vllm.compat import peer

    blocks = batch * -(-context // BLOCK_SIZE)
    cache = torch.randn(blocks, KV_HEADS, 2 * BLOCK_SIZE, HEAD_DIM, dtype=torch.bfloat16)
    caches = [cache] + [cache.clone() for _ in range(copies - 1)]
    lengths_R = torch.full((batch,), context, dtype=torch.int32)
    output_THD, table_RN = torch.empty_like(query_THD), block_table(context, batch)
    step = peer.decode_step(output_THD, query_THD, table_RN, lengths_R, KV_HEADS, BLOCK_SIZE)
    return lambda copy: step(caches[copy])


def cpu_model() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match.group(1) if match else platform.processor()


def machine_name() -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu_model()} {len(os.sched_getaffinity(0))} cores".lower()).strip("-")


def machine(threads: int) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if "vllm" in sys.modules:
        versions["vllm"] = sys.modules["vllm"].__version__
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "kernel_level": library.LEVELS[library.level()],
        "versions": versions,
        "commit": commit.stdout.strip() or "unknown",
    }


if __name__ == "__main__":
    main()
