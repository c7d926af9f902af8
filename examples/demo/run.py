"""The main job on the bundled model: plan, compress, verify, evaluate, serve, report. `make demo` runs it.

Every step is the command a user would type, echoed before it runs; the figures at the end are the ones those commands
printed. Recipes: balanced and aggressive of examples/recipes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import serving

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("balanced", "aggressive")
CONTEXT = 3072
"""Tokens of the prompt after which decode speed is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--model", type=Path, default=ROOT / "assets" / "reference-model")
    parser.add_argument("--samples", type=int, default=20, help="samples per task")
    options = parser.parse_args()
    # The model is tiny: a second thread costs more in waiting than it computes, most of all beside a server.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began = time.monotonic()
    out: Path = options.out
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    models = [out / name for name in RECIPES]
    plans = {}
    for name, folder in zip(RECIPES, models, strict=True):
        recipe = ROOT / "examples" / "recipes" / f"{name}.yaml"
        plans[name] = json.loads(kvcompress("plan", options.model, "--recipe", recipe, "--json", quiet=True))
        kvcompress("compress", options.model, "--recipe", recipe, "--out", folder)
        kvcompress("verify", folder)
    results = evaluate(options.model, models, out, options.samples)
    step(f"kvcompress serve {models[0]}")
    results["serving"]["server"] = serving.exercise(models[0], out / "server.log")
    results["plan"] = {name: plan["bytes_per_token"] for name, plan in plans.items()}
    finish(results, out)
    print_table(results, time.monotonic() - began)


def step(text: str) -> None:
    print(f"\n$ {text}", flush=True)


def kvcompress(*arguments: object, quiet: bool = False) -> str:
    """Run a kvcompress command, show it and what it prints, and stop the demo if it fails."""
    words = [str(argument) for argument in arguments]
    step("kvcompress " + " ".join(words))
    done = subprocess.run(
        [sys.executable, "-m", "kvcompress_cli", *words], stdout=subprocess.PIPE, text=True, check=False
    )
    if not quiet:
        print(done.stdout, end="", flush=True)
    # 1 is a verdict (`eval` found a model worse), which is for the table to tell; anything else is a failure.
    if done.returncode not in (0, 1 if words[0] == "eval" else 0):
        sys.exit(done.returncode)
    return done.stdout


def evaluate(base: Path, models: list[Path], out: Path, samples: int) -> dict[str, Any]:
    """Retrieval tasks, cache capacity and decode speed through vLLM in bfloat16, as served; perplexity and agreement
    through transformers in float32, which gives whole distributions."""
    folders = [str(model) for model in models]
    common = ("--baseline", base, "--json")
    vllm = ("--engine", "vllm", "--dtype", "bfloat16", "--samples", samples, "--serving-context", CONTEXT)
    kvcompress("eval", *folders, *common, *vllm, "--suite", "needle-ref", "--out", out / "eval-vllm", quiet=True)
    kvcompress("eval", *folders, *common, "--suite", "text", "--out", out / "eval-text", quiet=True)
    served, text = (json.loads((out / name / "results.json").read_text()) for name in ("eval-vllm", "eval-text"))
    served["perplexity"], served["agreement"] = text["perplexity"], text["agreement"]
    return served


def finish(results: dict[str, Any], out: Path) -> None:
    from kvcompress_eval.report import write_report

    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    write_report(results, out / "report.html")
    step(f"open {out / 'report.html'}")


def print_table(results: dict[str, Any], seconds: float) -> None:
    """The one table: base and compressed, side by side."""
    from kvcompress_cli.show import table
    from kvcompress_eval.report.figures import summary_figures

    names = [model["name"] for model in results["models"]]
    rows = [(figure.label, *(figure.values.get(name, "") for name in names)) for figure in summary_figures(results)]
    rows.append(("verdict at 1 point, 95 %", *(row["verdict"] or "" for row in results["overall"])))
    table(f"\nReference model, base and compressed; {seconds:.0f} s in all", ("", *names), rows)
    server = results["serving"]["server"]
    print(
        f"server: expected {server['expected']}, answered {server['answer']!r} (chat: {server['chat_answer']!r}); the "
        f"second took {server['cached_tokens']} of {server['prompt_tokens']} prompt tokens from the prefix cache"
    )


if __name__ == "__main__":
    main()
