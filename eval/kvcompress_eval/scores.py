"""Scores of tasks, and of all tasks together, against the baseline: rows of results.json in points, 0 to 100."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from kvcompress_eval.records import Records
from kvcompress_eval.statistics import ALPHA, Comparison, compare, mean_interval, verdicts
from kvcompress_eval.units import Unit
from kvcompress_eval.work import Work


@dataclass(frozen=True)
class Settings:
    """What a comparison depends on besides the scores."""

    margin: float
    seed: int


def task_rows(records: Sequence[Records], base: Records | None, work: Work, settings: Settings) -> list[dict[str, Any]]:
    """One row per task, length and model. All rows of the table are one family of verdicts."""
    rows = []
    for index, unit in enumerate(work.units):
        for record in records:
            scores = unit_scores(record, index, unit)
            other = None if base is None or base is record else unit_scores(base, index, unit)
            names = {"task": unit.task, "length": unit.length, "model": record.model.name}
            row = {**compared(scores, other, settings), "score": unit.points(scores)}
            rows.append({**names, "mean_length": unit.mean_length, **row})
    return with_verdicts(rows)


def overall_rows(
    records: Sequence[Records], base: Records | None, work: Work, settings: Settings
) -> list[dict[str, Any]]:
    """One row per model: the plain mean of tasks and lengths. The candidates are one family of verdicts."""
    if not work.units:
        return []

    def samples(record: Records) -> list[list[float]]:
        return [unit_scores(record, index, unit) for index, unit in enumerate(work.units)]

    weights = equal_weights(samples(records[0]))
    rows = []
    for record in records:
        other = None if base is None or base is record else flat(samples(base))
        rows.append({"model": record.model.name, **compared(flat(samples(record)), other, settings, weights)})
    return with_verdicts(rows)


def depth_rows(records: Sequence[Records], work: Work) -> list[dict[str, Any]]:
    """Mean score by task, length and depth of the answer, for rows that say it."""
    rows = []
    for record in records:
        for index, unit in enumerate(work.units):
            found: dict[float, list[float]] = defaultdict(list)
            for row in record.tasks[index].rows[: len(unit.prompts)]:
                if "depth" in row:
                    found[row["depth"]].append(row["score"])
            names = {"task": unit.task, "length": unit.length, "model": record.model.name}
            rows += [
                {**names, "depth": depth, "score": unit.points(scores), "n": len(scores)}
                for depth, scores in sorted(found.items())
            ]
    return rows


def unit_scores(record: Records, index: int, unit: Unit) -> list[float]:
    """Scores of one task at one length, 0 to 1, in the order of its prompts."""
    return [row["score"] for row in record.tasks[index].rows[: len(unit.prompts)]]


def flat(units: Sequence[Sequence[float]]) -> list[float]:
    return [score for scores in units for score in scores]


def equal_weights(units: Sequence[Sequence[float]]) -> list[float]:
    """Weights of all samples in a row such that each unit counts alike."""
    return [1 / len(scores) for scores in units for _ in scores]


def compared(
    scores: Sequence[float],
    base: Sequence[float] | None,
    settings: Settings,
    weights: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Score with interval, and the comparison with the baseline's scores if there is one; no verdict yet."""
    low, high = mean_interval(scores, weights)
    weight = weights or [1.0] * len(scores)
    mean = sum(score * share for score, share in zip(scores, weight, strict=True)) / sum(weight)
    row: dict[str, Any] = {
        "score": round(100 * mean, 2),
        "ci95": [100 * low, 100 * high],
        **dict.fromkeys(field.name for field in fields(Comparison)),
        "n": len(scores),
        "verdict": None,
    }
    if base is not None:
        found = compare(base, scores, margin=settings.margin, weights=weights, seed=settings.seed)
        row |= {name: list(value) if isinstance(value, tuple) else value for name, value in vars(found).items()}
    return row


def with_verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, those that were compared with their verdicts as one family."""
    family = [row for row in rows if row["delta"] is not None]
    found = verdicts([row["p_not_worse"] for row in family], [row["p_worse"] for row in family])
    for row, verdict in zip(family, found, strict=True):
        row["verdict"] = verdict
    return rows


def multiplicity(overall: Sequence[dict[str, Any]], tasks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many verdicts each family has, and what holds for them."""
    return {
        "method": "Holm within each claim at half of alpha",
        "alpha": ALPHA,
        "overall": sum(row["verdict"] is not None for row in overall),
        "tasks": sum(row["verdict"] is not None for row in tasks),
    }
