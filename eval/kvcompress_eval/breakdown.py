"""Scores of a task by one of its samples' details: difficulty, length group, turn. (Depths: `scores.depth_rows`.)"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvcompress_eval.rows import RowFile
from kvcompress_eval.units import Unit


def breakdown(units: Sequence[Unit], files: Mapping[str, Sequence[RowFile]]) -> list[dict[str, Any]]:
    """Rows of `task, length, model, by, value, score, n`, in points, 0 to 100.

    A conversation's first and second answer go by turn.

    Args:
        files: the units' rows, by model.
    """
    found = []
    for index, unit in enumerate(units):
        if unit.questions is None:
            continue
        for model, tasks in files.items():
            groups: dict[tuple[str, Any], list[float]] = {}
            for row in tasks[index].rows[: len(unit.prompts)]:
                for key, score in _parts(row, unit.questions.split_by):
                    groups.setdefault(key, []).append(score)
            for (by, value), scores in sorted(groups.items(), key=lambda item: item[0]):
                place = {"task": unit.task, "length": unit.length, "model": model, "by": by, "value": value}
                found.append({**place, "score": unit.points(scores), "n": len(scores)})
    return found


def _parts(row: Mapping[str, Any], split_by: Sequence[str]) -> Iterator[tuple[tuple[str, Any], float]]:
    for name in split_by:
        yield (name, row[name]), row["score"]
    for turn, score in enumerate(row.get("turns", ()), start=1):
        yield ("turn", turn), score
