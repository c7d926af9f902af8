"""Perplexity of the reference model with 10, 20 and 30 % of its linear layers' parameters removed by fwsvd.

    python benchmarks/weights_quality.py [--removed 0.1 0.2 0.3] [--samples 16] [--length 256] [--tokens 8192]

Every weighting with every allocation of ranks, calibrated on the built-in text and measured on held-out text in windows
that do not overlap; allocations of one budget make checkpoints of the same size, which the table shows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from cpu_decode import RESULTS, machine, machine_name
from publish import weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvcompress.serving.transformers  # noqa: F401  # so that transformers reads compressed checkpoints
from kvcompress import recipe as recipes
from kvcompress.checkpoint.manifest import Manifest
from kvcompress.methods import registry
from kvcompress.pipeline.compress import Options, compress

MODEL = Path(__file__).parents[1] / "assets" / "reference-model"
WEIGHTINGS = ("none", "fisher", "activation", "fisher+activation")
RANKS = ("uniform", "fisher", "error")
WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--removed", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of held-out text to score")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--note", default="", help="what else the machine was doing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    ids = AutoTokenizer.from_pretrained(MODEL)(
        (MODEL / "heldout.txt").read_text(encoding="utf-8"), add_special_tokens=False, verbose=False
    )["input_ids"][: args.tokens]
    base, rows = perplexity(MODEL, ids), []
    print(f"base model: {base:.3f}", flush=True)
    for removed in args.removed:
        for weighting in WEIGHTINGS:
            for ranks in RANKS:
                rows.append(measure(removed, weighting, ranks, ids, Options(samples=args.samples, length=args.length)))
                print(line(rows[-1]), flush=True)
    result = {
        "what": "perplexity of held-out text after fwsvd",
        "model": "assets/reference-model",
        "calibration": {"text": "builtin", "samples": args.samples, "length": args.length, "seed": 0},
        "scored_tokens": len(ids),
        "window": WINDOW,
        "machine": machine(args.threads),
        "note": args.note,
        "base_perplexity": base,
        "rows": rows,
    }
    path = RESULTS / f"{datetime.date.today()}-{machine_name()}-weights.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(weights(result))
    print(path)


def measure(removed: float, weighting: str, ranks: str, ids: list[int], options: Options) -> dict[str, Any]:
    """Compress in one setting; its size, its perplexity and what it took."""
    stage = {"method": "fwsvd", "weighting": weighting, "ranks": ranks, "removed": removed}
    recipe = recipes.parse(json.dumps({"version": 1, "stages": [stage]}), registry.schemas())
    with tempfile.TemporaryDirectory() as folder:
        out, began = Path(folder) / "out", time.process_time()
        compress(str(MODEL), recipe, out, options, lambda *_: None)
        seconds = time.process_time() - began
        sizes = Manifest.load(out).weights_bytes
        return {
            **stage,
            "weights_bytes": {"base": sizes.base, "compressed": sizes.compressed},
            "perplexity": perplexity(out, ids),
            "cpu_seconds": seconds,
        }


@torch.inference_mode()
def perplexity(model_dir: Path, ids: list[int]) -> float:
    """Per token, each window after a BOS token."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    total = 0.0
    for start in range(0, len(ids), WINDOW - 1):
        tokens_1T = torch.tensor([[model.config.bos_token_id, *ids[start : start + WINDOW - 1]]])
        logits_TV = model(tokens_1T).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits_TV, tokens_1T[0, 1:], reduction="sum"))
    return math.exp(total / len(ids))


def line(row: dict[str, Any]) -> str:
    sizes = row["weights_bytes"]
    return (
        f"{row['removed']:.0%} removed, {row['weighting']}, {row['ranks']} ranks: {row['perplexity']:.3f}, "
        f"{sizes['compressed'] / sizes['base']:.3f} of the bytes, {row['cpu_seconds']:.1f} s of CPU"
    )


if __name__ == "__main__":
    main()
