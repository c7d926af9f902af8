"""The summary as a Markdown table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcompress_eval.report.figures import Results, by_model, difference, scored, summary_figures
from kvcompress_eval.report.wording import notes, tail_sentence, verdict_sentence


def markdown_table(results: Results, *, tasks: bool = False) -> str:
    """One row per figure and one column per model, the verdict last; with `tasks`, one row per task and length too."""
    names = [model["name"] for model in results["models"]]
    overall = by_model(results["overall"])
    rows = [[figure.label, *(figure.values.get(name, "-") for name in names)] for figure in summary_figures(results)]
    if tasks:
        keys = dict.fromkeys((row["task"], row["length"]) for row in results["tasks"])
        for task, length in keys:
            found = by_model([row for row in results["tasks"] if (row["task"], row["length"]) == (task, length)])
            rows.append([f"{task}, {length:,} tokens", *(_task_cell(found[name]) for name in names)])
    if any(row["verdict"] for row in results["overall"]):
        margin = f"{results['margin']:g}"
        rows.append(
            [f"Verdict at {margin} point{'' if margin == '1' else 's'}, 95 %"]
            + [(overall[name]["verdict"] or "-") for name in names]
        )
    header = ["", *(_heading(model) for model in results["models"])]
    lines = [_line(header), _line(["---"] + ["---:"] * len(names)), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def write_table(results: Results, path: str | Path) -> None:
    """Write the table, task by task, with what it rests on below it: to be pasted into a model card."""
    from kvcompress.checkpoint.atomic import atomic_write

    hashes = [
        f"`{model['manifest_sha256']}` ({model['name']})" for model in results["models"] if model["manifest_sha256"]
    ]
    lines = [markdown_table(results, tasks=True), *_verdict_lines(results), *notes(results)]
    lines += [f"Manifests (sha256): {', '.join(hashes)}."] if hashes else []
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(Path(path), ("\n".join(lines) + "\n").encode())


def _verdict_lines(results: Results) -> list[str]:
    """The verdict on each candidate in words, with the tail of its divergence."""
    agreement = by_model(results["agreement"].get("models", []))
    family = results["multiplicity"]["overall"]
    found = []
    for row in results["overall"]:
        if row["verdict"]:
            tail = tail_sentence(agreement.get(row["model"], {}).get("text"))
            found.append(f"{row['model']}: {verdict_sentence(row, results['margin'], family)} {tail}".strip())
    return found


def _heading(model: dict[str, Any]) -> str:
    return f"{model['name']} (base)" if model["role"] == "baseline" else str(model["name"])


def _task_cell(row: dict[str, Any]) -> str:
    change = difference(row)
    return scored(row) if not change else f"{row['score']:.1f} ({change})"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
