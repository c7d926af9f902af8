"""The CUDA kernels on this machine's GPU: build, correctness, ceilings, sweep, profile. `make gpu` runs it.

    python -m benchmarks.gpu_decode [--minutes 8.5] [--forms heads blocks latents shared] [--note "..."]

Writes benchmarks/results/DATE-GPU-gpu-decode.json, named after the forms if not all are run, and prints a table. Exit
code 0: all done; 1: a kernel computes something else than the torch code (its form of cache is named and not timed);
2: no GPU, or no compiler for it.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
FORMS = ("heads", "blocks", "latents", "shared")
SECONDS_FOR_ONE = 10.0
SECONDS_FOR_TOOLS = {"sanitizer": 80.0, "ncu": 90.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="when to stop measuring")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="forms of cache to run")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8:
        print(
            "error: found no NVIDIA GPU of compute capability 8.0 or newer that torch can use; run make gpu on one",
            file=sys.stderr,
        )
        sys.exit(2)
    # Not before: what they import needs a GPU to be of use.
    from benchmarks.gpu import build, profile, sweep, timing

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
    failed = result["failed"] = {}
    for form in args.forms:
        if told := complaint(form):
            failed[form] = told
            print(f"{form}:\n{told}")
    forms = [form for form in args.forms if form not in failed]
    say("memory")
    ceilings = result["ceilings"] = timing.ceilings()
    torch.cuda.empty_cache()
    rows = result["rows"] = []
    result["skipped"] = []
    tools = sum(SECONDS_FOR_TOOLS.values())

    def share(form: str) -> float:
        """Seconds of those left that a form may take, the same for every form that is still to be timed."""
        return max(0.0, left() - tools) / (len(forms) - forms.index(form))

    for form in forms:
        say(f"sweep of {form}")
        until = time.monotonic() + share(form)
        for context, batch in itertools.product(sweep.CONTEXTS, sweep.BATCHES):
            for name, measure in measures(form):
                if time.monotonic() > until - SECONDS_FOR_ONE:
                    result["skipped"].append([form, name, context, batch])
                    continue
                try:
                    rows += [{"form": form} | row for row in measure(context, batch)]
                except torch.OutOfMemoryError:
                    result["skipped"].append([form, name, context, batch])
                torch.cuda.empty_cache()
            here = [row for row in rows if (row["context"], row["batch"]) == (context, batch)]
            show(form, here, ceilings["read_bytes_per_s"])
    say("encoding")
    result["encoding"] = sweep.encoding() if "heads" in forms else []
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
    part = "" if set(forms) == set(FORMS) else "-" + "-".join(forms)
    path = RESULTS / f"{datetime.date.today()}-{slug(result['machine']['gpu'])}-gpu-decode{part}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
    sys.exit(bool(failed))


def complaint(form: str) -> str:
    """What the form's checks say that failed; nothing if none did. In a process of its own: a kernel that fails may
    take the device's context with it."""
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--form", form]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr)[-4000:] if done.returncode else ""


def measures(form: str) -> list[tuple[str, Callable[[int, int], list[dict[str, Any]]]]]:
    """What is timed of a form for every context and batch, by name."""
    from benchmarks.gpu import blocks, latents, shared, sweep

    if form == "latents":
        return [(f"{heads} heads", partial(latents.measure, heads)) for heads in latents.HEADS]
    module: Any = {"heads": sweep, "blocks": blocks, "shared": shared}[form]

    def one(instance: str, context: int, batch: int) -> list[dict[str, Any]]:
        return [module.measure(instance, context, batch)]

    ours = [(instance, partial(one, instance)) for instance in module.INSTANCES]
    return [("bf16", sweep.baselines), *ours] if form == "heads" else ours


def show(form: str, rows: list[dict[str, Any]], read: float) -> None:
    """The rows of a form, of all those of one context and batch."""
    from benchmarks.gpu import latents, shared

    own = [row for row in rows if row["form"] == form]
    if form == "shared":
        for row in own:
            shared.print_row(row, read)
    elif form == "latents":
        for _, of_heads in itertools.groupby(own, lambda row: row["heads"]):
            latents.print_rows(list(of_heads), read)
    elif own:
        print_rows(own, [row for row in rows if row["form"] == "heads"], read)


def print_rows(rows: list[dict[str, Any]], compared: list[dict[str, Any]], read: float) -> None:
    """One context and batch: time, share of the read bandwidth, speed-up over the best bf16 and over our 16 bits."""
    timed = [row for row in compared if "whole_median_us" in row]
    best = min((row["whole_median_us"] for row in timed if "kernel_median_us" not in row), default=None)
    own = next((row["whole_median_us"] for row in timed if row["method"] == "16"), None)
    context, batch = rows[0]["context"], rows[0]["batch"]
    print(f"context {context}, batch {batch}:   whole us   kernel us   % of read   over bf16   over own 16")
    for row in rows:
        if "whole_median_us" not in row:
            continue
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
