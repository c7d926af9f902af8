"""The example report: every recipe worth a look against the reference model. `make report` runs it.

Tasks, sizes and the noise floor through vLLM; perplexity, KL divergence and its course over positions through
transformers, which gives whole distributions. Both in float32. Interrupt it whenever you like: it goes on where it
stopped. Writes docs/example-report/{report.html, results.json, table.md, pareto.png}.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import kvcompress_eval
from kvcompress_eval.candidates import make_checkpoints
from kvcompress_eval.report.browser import find_browser, picture
from kvcompress_eval.suite import SUITES

ROOT = Path(__file__).resolve().parents[2]
BASE = "assets/reference-model"
RECIPES = ("half", "balanced", "aggressive", "matryoshka", "xkv", "gear", "transmla")
PARTS = ("perplexity", "agreement", "drift")
"""Of results.json, what the run on text measures."""

TEXT = replace(SUITES["text"], text_tokens=8192)
HELDOUT = f"{BASE}/heldout.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/example-report"))
    parser.add_argument("--work", type=Path, default=Path("build/example-report"), help="checkpoints and samples")
    parser.add_argument("--suite", default="needle-ref")
    parser.add_argument("--samples", type=int, default=20, help="per task and length")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024])
    options = parser.parse_args()
    os.chdir(ROOT)  # so that the report names no folder of this machine
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    models = make_checkpoints(
        BASE, [f"examples/recipes/{name}.yaml" for name in RECIPES], options.work / "models", tell
    )
    shared: dict[str, Any] = {"baseline": BASE, "dtype": "float32", "resume": True, "progress": tell}
    # Text first: vLLM leaves this process with its own settings.
    text = kvcompress_eval.run(
        models, suite=TEXT, text=HELDOUT, engine="transformers", out=options.work / "text", **shared
    )
    results = kvcompress_eval.run(
        models,
        suite=options.suite,
        samples=options.samples,
        lengths=options.lengths,
        engine="vllm",
        noise_floor=True,
        out=options.work / "tasks",
        **shared,
    )
    results |= {name: text[name] for name in PARTS}
    write(results, options.out)


def write(results: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    kvcompress_eval.write_table(results, out / "table.md")
    kvcompress_eval.write_report(results, out / "report.html")
    if find_browser() is None:
        print("no Chromium found: pareto.png stays as it is")
        return
    picture(out / "report.html", out / "pareto.png", element="#pareto", width=720)


def tell(what: str, done: int, total: int) -> None:
    if done in (0, total):
        print(f"{what}: {done} of {total}", flush=True)


if __name__ == "__main__":
    main()
