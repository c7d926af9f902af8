"""NVIDIA's own tools on the kernels: compute-sanitizer on a small case, Nsight Compute (ncu) on a few kernels.

`python -m benchmarks.gpu.profile INSTANCE` runs one instance a few times, for ncu to look at.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from typing import Any

KERNELS = ("16", "4", "2", "bands 3.5/2.75", "gear 4", "gear 2")
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)


def sanitize(timeout: float) -> dict[str, str]:
    """What memcheck and racecheck say: "clean", or what they found, or why they did not run."""
    tool = _find("compute-sanitizer")
    if tool is None:
        return {"memcheck": "no compute-sanitizer here", "racecheck": "no compute-sanitizer here"}
    found = {}
    for check in ("memcheck", "racecheck"):
        command = [
            tool,
            "--tool",
            check,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "benchmarks.gpu.check",
            "--small",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout / 2, check=False)
        except subprocess.TimeoutExpired:
            found[check] = f"did not end in {timeout / 2:.0f} s"
            continue
        found[check] = "clean" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]
    return found


def profile(timeout: float) -> dict[str, Any]:
    """Metrics of each kernel by name, or why there are none."""
    tool = _find("ncu")
    if tool is None:
        return {"missing": "no ncu here"}
    found: dict[str, Any] = {}
    for instance in KERNELS:
        options = [
            "--clock-control",
            "none",
            "--kernel-name",
            "regex:decode",
            "--launch-skip",
            "2",
            "--launch-count",
            "1",
        ]
        options += ["--csv", "--page", "raw", "--metrics", ",".join(METRICS)]
        command = [tool, *options, sys.executable, "-m", "benchmarks.gpu.profile", instance]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout / len(KERNELS), check=False)
        except subprocess.TimeoutExpired:
            found[instance] = {"missing": f"ncu did not end in {timeout / len(KERNELS):.0f} s"}
            continue
        found[instance] = metrics(done.stdout) or {"missing": (done.stdout + done.stderr)[-1000:]}
    return found


def metrics(text: str) -> dict[str, str]:
    """Of ncu's raw page as CSV: names, units, then one row of values per kernel."""
    rows = list(csv.reader(io.StringIO("\n".join(line for line in text.splitlines() if line.startswith('"')))))
    if len(rows) < 3:
        return {}
    names, units, values = rows[0], rows[1], rows[2]
    return {
        name: f"{value} {unit}".strip()
        for name, unit, value in zip(names, units, values, strict=True)
        if name in METRICS
    }


def _find(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin")


def main() -> None:
    import torch

    from benchmarks.gpu import blocks, sweep

    instance = sys.argv[1]
    module = blocks if instance in blocks.INSTANCES else sweep
    step = module.kernel_step(module.Cache(instance, 32768, 8), 8)
    for _ in range(4):
        step(0)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
