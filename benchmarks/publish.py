"""Every table of README.md, and docs/real-model.md, made from the newest result files in benchmarks/results.

    python benchmarks/publish.py                                   # write the tables again
    python benchmarks/publish.py --demo demo/results.json --machine epyc-2core    # first take in the demo's figures
    python benchmarks/publish.py --page                            # docs/real-model.md alone

A table stands between the lines `<!-- KIND:begin -->` and `<!-- KIND:end -->`; KIND is one of `TABLES`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import real_page
from kvcompress_eval.report import markdown_table
from quality import reading, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="results.json of `make demo`, to be kept with today's date")
    parser.add_argument("--machine", default="cpu", help="short name of the machine, e.g. epyc-2core")
    parser.add_argument("--page", action="store_true", help="write docs/real-model.md and leave README.md as it is")
    options = parser.parse_args()
    (ROOT / "docs" / "real-model.md").write_text(real_model())
    if options.page:
        return
    if options.demo is not None:
        results = json.loads(options.demo.read_text())
        for model in results["models"]:
            model["path"] = model["name"]  # where the folders lay on that machine says nothing to a reader
        kept = RESULTS / f"{datetime.date.today()}-{options.machine}-demo.json"
        kept.write_text(json.dumps(results, indent=1) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))


def with_tables(text: str) -> str:
    """README.md with every table made anew."""
    marked = re.compile(r"(<!-- ([\w-]+):begin -->)\n.*?(<!-- \2:end -->)", re.DOTALL)
    return marked.sub(lambda found: f"{found[1]}\n{section(found[2], TABLES[found[2]])}\n{found[3]}", text)


def section(kind: str, make: Callable[[dict[str, Any]], str]) -> str:
    """A table and where its figures are."""
    newest = newest_result(kind)
    date, machine = re.fullmatch(rf"(\d{{4}}-\d\d-\d\d)-(.+)-{kind}", newest.stem).groups()  # type: ignore[union-attr]
    source = f"{date}, {machine}: [{newest.name}]({newest.relative_to(ROOT)})"
    return f"{make(json.loads(newest.read_text()))}\n\n{source}"


def real_model() -> str:
    """docs/real-model.md."""
    real, peers = (newest_result(kind) for kind in ("real", "peers"))
    return real_page.page(real.stem, json.loads(real.read_text()), peers.stem, json.loads(peers.read_text()))


def newest_result(kind: str) -> Path:
    return max(RESULTS.glob(f"*-{kind}.json"))  # names begin with the day


def demo(results: dict[str, Any]) -> str:
    names = {task["task"] for task in results["tasks"]}
    samples = "/".join(map(str, sorted({task["n"] for task in results["tasks"]})))
    return (
        f"{markdown_table(results)}\n`make demo`: {len(names)} retrieval tasks, {samples} samples each, 1,024 tokens."
    )


def methods(results: dict[str, Any]) -> str:
    """Methods down; for every compression score, perplexity and KL across."""
    rows = results["rows"]
    [base] = [row for row in rows if row["times"] == 1]
    ratios = sorted({row["times"] for row in rows} - {1})
    found = {(row["label"], row["times"]): row for row in rows}
    heads = [f"{times}x: score | ppl | KL" for times in ratios]
    lines = [f"| cache | {' | '.join(heads)} |", "| --- |" + " ---: |" * (3 * len(ratios))]
    for label in dict.fromkeys(row["label"] for row in rows if row["times"] != 1):
        cells = [_cells(found.get((label, times))) for times in ratios]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    note = f"Base: score {base['score']:.1f}, perplexity {base['perplexity']:.2f}."
    return "\n".join(
        [*lines, "", f"{note} {results['samples_per_task']} samples for each of {len(base['tasks'])} tasks."]
    )


def _cells(row: dict[str, Any] | None) -> str:
    return "- | - | -" if row is None else f"{row['score']:.1f} | {row['perplexity']:.2f} | {row['kl']:.4f}"


def weights(results: dict[str, Any]) -> str:
    """Weightings down, shares removed and allocations across."""
    found = {(row["removed"], row["weighting"], row["ranks"]): row["perplexity"] for row in results["rows"]}
    across = list(dict.fromkeys((removed, ranks) for removed, _, ranks in found))
    heads = [f"{removed:.0%} {ranks}" for removed, ranks in across]
    lines = [f"| base {results['base_perplexity']:.2f} | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(across)]
    for weighting in dict.fromkeys(row["weighting"] for row in results["rows"]):
        cells = [f"{found[removed, weighting, ranks]:.2f}" for removed, ranks in across]
        lines.append(f"| {weighting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def slope(results: dict[str, Any]) -> str:
    """Caches down, contexts across, in milliseconds per token."""
    rows = results["rows"]
    contexts = list(rows[0]["ms_per_token"])
    lines = [f"| ms per token after | {' | '.join(f'{int(c):,}' for c in contexts)} | us per 1K tokens more |"]
    lines.append("| --- |" + " ---: |" * (len(contexts) + 1))
    for row in rows:
        cells = [f"{row['ms_per_token'][context]:.2f}" for context in contexts]
        lines.append(f"| {row['cache']} | {' | '.join(cells)} | {row['us_per_1k_tokens']:.0f} |")
    return "\n".join(lines)


def kernels(results: dict[str, Any]) -> str:
    """Caches down, contexts across: how many times as fast as vLLM's own kernel on a bfloat16 cache."""
    rows = [row for row in results["rows"] if row["context"] in (4096, 16384, 32768, 65536)]
    heads = [f"{row['context'] // 1024}K{' x 4' if row['batch'] == 4 else ''}" for row in rows]
    lines = [f"| {results['machine']['threads']} threads | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(rows)]
    for name in rows[0]["speedup_wall"]:
        if name not in (rows[0]["baseline"], "torch sdpa bf16") and not name.startswith("append"):
            lines.append(f"| {name} | {' | '.join(format(row['speedup_wall'][name], '.2f') for row in rows)} |")
    return "\n".join(lines)


def compress(results: dict[str, Any]) -> str:
    lines = ["| model | recipe | weights, MB | seconds | peak memory, MB |", "| --- | --- |" + " ---: |" * 3]
    for row in results["rows"]:
        weights_mb, peak_mb = (f"{row[name] / 1e6:,.0f}" for name in ("weights_bytes", "peak_bytes"))
        lines.append(f"| {row['model']} | {row['recipe']} | {weights_mb} | {row['seconds']:.0f} | {peak_mb} |")
    return "\n".join(lines)


def peers(results: dict[str, Any]) -> str:
    """Our recipes among simulated peers by size, and where we lose."""
    first = table.lengths(results)[0]
    read = "\n".join(f"- {sentence}" for sentence in reading.sentences(results, first))
    return f"{table.overview(results)}\n\n{results['model']}, {table.title(results, first)}.\n\n{read}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo,
    "methods": methods,
    "peers": peers,
    "weights": weights,
    "slope": slope,
    "slope-llama-8b-layer": slope,
    "slope-llama-8b-layer-32k": slope,
    "cpu-decode": kernels,
    "cpu-decode-blocks": kernels,
    "cpu-decode-latents": kernels,
    "compress": compress,
}


if __name__ == "__main__":
    main()
