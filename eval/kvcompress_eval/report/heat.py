"""Heat maps as tables: task by model, and length by depth. Each cell has its number and a shade from 0 to 100."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from kvcompress_eval.report.figures import Results

FULL_SHADE = 30.0
"""Points of loss at which a cell of the task map is darkest."""


@dataclass(frozen=True)
class Cell:
    """One cell: what it says, what it says when asked, and how strongly it is shaded (below 0 for a gain)."""

    text: str
    title: str
    shade: float


EMPTY = Cell("", "", 0)


@dataclass(frozen=True)
class HeatMap:
    """A table of cells. `name` is the model it is about, empty where models are columns."""

    name: str
    columns: list[str]
    rows: list[tuple[str, str, list[Cell]]]
    """Heading, note below it, cells."""


def task_map(results: Results) -> HeatMap | None:
    """Scores by task and model, shaded by the loss against the base; None without a comparison."""
    names = [model["name"] for model in results["models"]]
    if not any(row["delta"] is not None for row in results["tasks"]):
        return None
    rows = []
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in results["tasks"]):
        found = {row["model"]: row for row in results["tasks"] if (row["task"], row["length"]) == (task, length)}
        cells = []
        for name in names:
            row = found[name]
            delta = row["delta"] or 0.0
            title = f"{name}, {task} at {length:,}: {row['score']:.1f}"
            title += "" if row["delta"] is None else f", {delta:+.1f} against the base"
            cells.append(Cell(f"{row['score']:.0f}", title, _shade(-delta)))
        rows.append((task, f"{length:,} tokens", cells))
    return HeatMap("", names, rows)


def depth_maps(results: Results) -> list[HeatMap]:
    """For each model, scores by length (and task) and depth of the answer, shaded by what is missing from 100."""
    depths = sorted({row["depth"] for row in results["depths"]})
    keys = list(dict.fromkeys((row["task"], row["length"]) for row in results["depths"]))
    found: dict[str, dict[tuple[str, int, float], Cell]] = defaultdict(dict)
    for row in results["depths"]:
        where = f"{row['task']} at {row['length']:,}, depth {row['depth']:g} %"
        title = f"{where}: {row['score']:.1f} over {row['n']} sample{'s' * (row['n'] != 1)}"
        cell = Cell(f"{row['score']:.0f}", title, 100 - row["score"])
        found[row["model"]][row["task"], row["length"], row["depth"]] = cell
    return [
        HeatMap(
            name,
            [f"{depth:g}" for depth in depths],
            [
                (task, f"{length:,} tokens", [cells.get((task, length, depth), EMPTY) for depth in depths])
                for task, length in keys
            ],
        )
        for name, cells in found.items()
    ]


def _shade(loss: float) -> float:
    return round(max(-100.0, min(100.0, 100 * loss / FULL_SHADE)), 1)
