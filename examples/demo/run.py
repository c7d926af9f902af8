"""The main job on the bundled model: plan, compress, verify, evaluate, serve, report. `make demo` runs it.

Every step is the command a user would type, echoed before it runs; the figures at the end are the ones those commands
printed. Recipes: balanced and aggressive of examples/recipes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from examples.demo.serving import exercise
from examples.shared.commands import kvcompress, step

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
    # Two steps at a time where one does not need the other: each takes one core.
    with ThreadPoolExecutor(2) as pool:
        plans = dict(zip(RECIPES, pool.map(lambda folder: make(options.model, folder), models), strict=True))
        on_vllm = pool.submit(evaluate_tasks, options.model, models, out, options.samples)
        on_text = pool.submit(evaluate_text, options.model, models, out)
        server = pool.submit(serve, models[0], out)
        results = on_vllm.result() | on_text.result()
        results["serving"]["server"] = server.result()
    results["plan"] = {name: plan["bytes_per_token"] for name, plan in plans.items()}
    finish(results, out)
    print_table(results, time.monotonic() - began)


def make(base: Path, folder: Path) -> dict[str, Any]:
    """Plan, compress and verify with the recipe of the folder's name; the plan."""
    recipe = ROOT / "examples" / "recipes" / f"{folder.name}.yaml"
    plan: dict[str, Any] = json.loads(kvcompress("plan", base, "--recipe", recipe, "--json", quiet=True))
    kvcompress("compress", base, "--recipe", recipe, "--out", folder)
    kvcompress("verify", folder)
    return plan


def evaluate_tasks(base: Path, models: list[Path], out: Path, samples: int) -> dict[str, Any]:
    """Retrieval tasks, cache capacity and decode speed through vLLM in bfloat16, as served."""
    options = ("--engine", "vllm", "--dtype", "bfloat16", "--samples", samples, "--serving-context", CONTEXT)
    return evaluate("needle-ref", base, models, out / "eval-vllm", *options)


def evaluate_text(base: Path, models: list[Path], out: Path) -> dict[str, Any]:
    """Perplexity and agreement through transformers in float32, which gives whole distributions."""
    # Text of the kind that the bundled model was trained on; other models have the texts that come with kvcompress.
    own = base / "heldout.txt"
    results = evaluate("text", base, models, out / "eval-text", *(("--text", own) if own.is_file() else ()))
    return {name: results[name] for name in ("perplexity", "agreement", "drift")}


def evaluate(suite: str, base: Path, models: list[Path], out: Path, *options: object) -> dict[str, Any]:
    kvcompress("eval", *models, "--baseline", base, "--suite", suite, *options, "--out", out, "--json", quiet=True)
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    return results


def serve(model: Path, out: Path) -> dict[str, Any]:
    step(f"kvcompress serve {model}")
    return exercise(model, out / "server.log")


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
