"""Time and memory of `kvcompress compress`: the reference model, and one layer of Llama-3.1-8B's shape (0.4 GB).

    python benchmarks/compress.py --work build/compress [--models reference-model llama-8b-layer] [--recipes balanced]

The peak is the largest resident set of the process that compresses, torch and transformers included.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cpu_decode import RESULTS, machine, machine_name
from models import MODELS

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--recipes", nargs="+", default=["balanced"], help="names of files in examples/recipes")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--note", default="", help="what else the machine was doing")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = [
        measure(name, MODELS[name](args.work), recipe, args.work, args.threads)
        for name in args.models
        for recipe in args.recipes
    ]
    path = RESULTS / f"{datetime.date.today()}-{machine_name()}-compress.json"
    RESULTS.mkdir(exist_ok=True)
    result = {"what": "kvcompress compress", "machine": machine(args.threads), "note": args.note, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


def measure(name: str, model: Path, recipe: str, work: Path, threads: int) -> dict[str, Any]:
    """One run of the command, with its default calibration."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, "-m", "kvcompress_cli", "compress", str(model), "--out", str(out)]
    words += ["--recipe", str(RECIPES / f"{recipe}.yaml")]
    began = time.perf_counter()
    process = subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"error: {' '.join(words)} failed")
    found = {
        "model": name,
        "recipe": recipe,
        "weights_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * resource_unit(),
    }
    print(f"{name}, {recipe}: {seconds:.0f} s, peak {found['peak_bytes'] / 2**20:.0f} MiB")
    shutil.rmtree(out)
    return found


def resource_unit() -> int:
    """Bytes of one unit of `ru_maxrss`: kibibytes on Linux, bytes on macOS."""
    return 1 if sys.platform == "darwin" else 1024


if __name__ == "__main__":
    main()
