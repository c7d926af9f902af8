"""The CUDA kernels on this machine's GPU: build, correctness, ceilings, sweep, profile. `make gpu` runs it.

    python -m benchmarks.gpu_decode [--minutes 8.5] [--note "..."]

Writes benchmarks/results/DATE-GPU-gpu-decode.json and prints a table. Exit code 0: all done; 1: a kernel computes
something else than the torch code (nothing is timed then); 2: no GPU, or no compiler for it.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
SECONDS_FOR_TOOLS = {"sanitizer": 80.0, "ncu": 90.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="when to stop measuring")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8:
        print(
            "error: found no NVIDIA GPU of compute capability 8.0 or newer that torch can use; run make gpu on one",
            file=sys.stderr,
        )
        sys.exit(2)
    # Not before: what they import needs a GPU to be of use.
    from benchmarks.gpu import blocks, build, check, latents, profile, shared, sweep, timing

    begin = time.monotonic()

    def left() -> float:
        return 60 * args.minutes - (time.monotonic() - begin)

    say("build")
    try:
        build.use(build.build())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    result: dict[str, Any] = {
        "what": "decode attention, one Llama-3.1-8B layer, GPU",
        "note": args.note,
        "machine": machine(),
    }
    result["shape"] = {
        "heads": sweep.HEADS,
        "kv_heads": sweep.KV_HEADS,
        "head_dim": sweep.HEAD_DIM,
        "block_size": sweep.BLOCK_SIZE,
    }
    say("correctness")
    failed = check.failures()
    for name, text in failed.items():
        print(f"failed: {name}: {text}")
    if failed:
        sys.exit(1)
    say("memory")
    ceilings = result["ceilings"] = timing.ceilings()
    torch.cuda.empty_cache()
    say("sweep")
    rows = result["rows"] = []
    result["skipped"] = []
    for context in sweep.CONTEXTS:
        for batch in sweep.BATCHES:
            for instance in [None, *sweep.INSTANCES, *blocks.INSTANCES]:
                if left() < sum(SECONDS_FOR_TOOLS.values()) + 15:
                    result["skipped"].append([instance, context, batch])
                    continue
                try:
                    rows += measured(instance, context, batch)
                except torch.OutOfMemoryError:
                    result["skipped"].append([instance, context, batch])
                torch.cuda.empty_cache()
            print_rows(rows, context, batch, ceilings["read_bytes_per_s"])
    say("MLA latents")
    result["latents"] = []
    for heads, context, batch in itertools.product(latents.HEADS, sweep.CONTEXTS, sweep.BATCHES):
        if left() < sum(SECONDS_FOR_TOOLS.values()) + 10:
            result["skipped"].append(["latents", heads, context, batch])
            continue
        found = latents.measure(heads, context, batch)
        latents.print_rows(found, ceilings["read_bytes_per_s"])
        result["latents"] += found
    say("latents that layers share")
    result["shared"] = []
    for context, batch, instance in itertools.product(sweep.CONTEXTS, sweep.BATCHES, shared.INSTANCES):
        if left() < sum(SECONDS_FOR_TOOLS.values()) + 10:
            result["skipped"].append([f"shared {instance}", context, batch])
            continue
        try:
            result["shared"].append(shared.measure(instance, context, batch))
            shared.print_row(result["shared"][-1], ceilings["read_bytes_per_s"])
        except torch.OutOfMemoryError:
            result["skipped"].append([f"shared {instance}", context, batch])
        torch.cuda.empty_cache()
    say("encoding")
    result["encoding"] = sweep.encoding()
    for row in result["encoding"]:
        print(f"  {row['what']} {row['tokens']} tokens, {row['method']}: {row['median_us']:.1f} us")
    say("compute-sanitizer")
    result["sanitizer"] = profile.sanitize(min(SECONDS_FOR_TOOLS["sanitizer"], max(20.0, left())))
    print(
        "  "
        + "; ".join(f"{tool}: {text.splitlines()[-1] if text else ''}" for tool, text in result["sanitizer"].items())
    )
    say("ncu")
    result["ncu"] = profile.profile(min(SECONDS_FOR_TOOLS["ncu"], max(20.0, left())))
    for instance, found in result["ncu"].items():
        print(f"  {instance}: {found}")
    result["seconds"] = time.monotonic() - begin
    path = RESULTS / f"{datetime.date.today()}-{slug(result['machine']['gpu'])}-gpu-decode.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


def measured(instance: str | None, context: int, batch: int) -> list[dict[str, Any]]:
    """Rows of one of our methods, or of what it is compared with."""
    from benchmarks.gpu import blocks, sweep

    if instance is None:
        return sweep.baselines(context, batch)
    return [(blocks if instance in blocks.INSTANCES else sweep).measure(instance, context, batch)]


def print_rows(rows: list[dict[str, Any]], context: int, batch: int, read: float) -> None:
    """One context and batch: time, share of the read bandwidth, speed-up over the best bf16 and over our 16 bits."""
    chosen = [row for row in rows if (row["context"], row["batch"]) == (context, batch) and "whole_median_us" in row]
    best = min((row["whole_median_us"] for row in chosen if "kernel_median_us" not in row), default=None)
    own = next((row["whole_median_us"] for row in chosen if row["method"] == "16"), None)
    print(f"context {context}, batch {batch}:   whole us   kernel us   % of read   over bf16   over own 16")
    for row in chosen:
        whole, kernel = row["whole_median_us"], row.get("kernel_median_us", row["whole_median_us"])
        share = 100 * row["bytes"] / kernel * 1e6 / read
        ratios = [f"{base / whole:10.2f}x" if base else f"{'-':>11}" for base in (best, own)]
        print(f"  {row['method']:<36}{whole:10.1f}{kernel:12.1f}{share:12.1f}{''.join(ratios)}", flush=True)


def machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "commit": commit.stdout.strip() or "unknown",
    }


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def say(what: str) -> None:
    print(f"== {what}", flush=True)


if __name__ == "__main__":
    main()
