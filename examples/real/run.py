"""The main job on a real model: plan, compress, verify, evaluate, serve, report. `make real` runs it.

Every step is the command a user would type, echoed before it runs; what is finished is not done again. The figures go
to benchmarks/results, and from there, with the newest comparison with peers, into docs/real-model.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from examples.real.model import real_model
from examples.shared.commands import kvcompress, step
from examples.shared.server import serving

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MODEL = Path("build/models/SmolLM2-135M-Instruct")
RECIPES = ("half", "balanced")
QUESTION = "What is the capital of France, and what is it known for?"
ANSWER_TOKENS = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/real"), help="checkpoints, report and logs")
    parser.add_argument("--machine", default="cpu", help="short name of the machine for the result's name")
    options = parser.parse_args()
    os.chdir(ROOT)  # so that no result names a folder of this machine
    began = time.monotonic()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    base = real_model(MODEL)
    folders = [out / name for name in RECIPES]
    # Two at a time, each on a core of its own.
    with ThreadPoolExecutor(2) as pool:
        plans = list(pool.map(lambda folder: make(base, folder), folders))
    report = out / "report"
    kvcompress("eval", *folders, "--baseline", base, "--suite", "quick", "--out", report, "--resume")
    results = {
        "model": base.name,
        "plan": dict(zip(RECIPES, plans, strict=True)),
        "eval": without_paths(json.loads((report / "results.json").read_text())),
        "chat": {"question": QUESTION, "answers": {name: chat(out / name, out) for name in RECIPES}},
        "seconds": round(time.monotonic() - began),
    }
    path = RESULTS / f"{datetime.date.today()}-{options.machine}-real.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    step("python benchmarks/publish.py --page")
    subprocess.run([sys.executable, "benchmarks/publish.py", "--page"], check=True)
    show(results)
    print(f"{path.relative_to(ROOT)} and docs/real-model.md, after {results['seconds'] / 60:.0f} minutes")


def make(base: Path, folder: Path) -> dict[str, Any]:
    """Plan, compress and verify with the recipe of the folder's name; the plan without its layers."""
    recipe = Path("examples/recipes") / f"{folder.name}.yaml"
    plan: dict[str, Any] = json.loads(kvcompress("plan", base, "--recipe", recipe, "--json", quiet=True))
    if not folder.is_dir():
        kvcompress("compress", base, "--recipe", recipe, "--out", folder, "--resume", threads=1)
    kvcompress("verify", folder)
    return {name: plan[name] for name in ("bytes_per_token", "weights_bytes", "capacity_tokens", "context")}


def chat(model: Path, out: Path) -> dict[str, Any]:
    """Serve a checkpoint and ask it `QUESTION`."""
    step(f"kvcompress serve {model}")
    with serving(model, out / f"server-{model.name}.log") as server:
        answer = server.chat(QUESTION, ANSWER_TOKENS)
    choice = answer["choices"][0]
    said = choice["message"]["content"].strip()
    print(f"{QUESTION}\n{said}", flush=True)
    return {"start_seconds": server.start_seconds, "answer": said, "finish": choice["finish_reason"]}


def show(results: dict[str, Any]) -> None:
    """The one table: the base and what was made of it, side by side."""
    from kvcompress_cli.show import table
    from kvcompress_eval.report.figures import summary_figures

    found = results["eval"]
    names = [model["name"] for model in found["models"]]
    rows = [(figure.label, *(figure.values.get(name, "") for name in names)) for figure in summary_figures(found)]
    rows.append(("verdict at 1 point, 95 %", *(row["verdict"] or "" for row in found["overall"])))
    table(f"\n{results['model']}, base and compressed", ("", *names), rows)


def without_paths(results: dict[str, Any]) -> dict[str, Any]:
    """Where the folders lay says nothing to a reader."""
    for model in results["models"]:
        model["path"] = model["name"]
    return results


if __name__ == "__main__":
    main()
