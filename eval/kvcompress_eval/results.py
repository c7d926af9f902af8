"""From rows to results.json: scores with intervals, paired differences, verdicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvcompress_eval.breakdown import breakdown
from kvcompress_eval.environment import environment
from kvcompress_eval.models import MANIFEST, Model
from kvcompress_eval.records import Records
from kvcompress_eval.statistics import compare, mean_interval
from kvcompress_eval.tasks import perplexity
from kvcompress_eval.tasks.ruler import task_score
from kvcompress_eval.work import Unit, Work

FORMAT_VERSION = 1


def summarise(
    records: Sequence[Records], work: Work, *, margin: float, seed: int, how: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of results.json. Scores and differences are in points, 0 to 100."""
    base = records[0] if len(records) > 1 and records[0].model.role == "baseline" else None
    tasks = [
        _task_row(unit, record, base, index, margin, seed)
        for index, unit in enumerate(work.units)
        for record in records
    ]
    return {
        "format_version": FORMAT_VERSION,
        "models": [_model(record.model) for record in records],
        "overall": [_overall_row(record, base, work, margin, seed) for record in records] if work.units else [],
        "tasks": tasks,
        "breakdown": breakdown(work.units, {record.model.name: record.tasks for record in records}),
        "skipped": [vars(item) for item in work.skipped],
        "perplexity": _perplexity(records, base, work, seed),
        "agreement": _agreement(records, base),
        "serving": _serving(records),
        "margin": margin,
        "environment": {**environment(), **how},
        "seed": seed,
    }


def _model(model: Model) -> dict[str, Any]:
    manifest_path = model.folder / MANIFEST
    manifest = json.loads(manifest_path.read_text("utf-8")) if manifest_path.is_file() else {}
    return {
        "name": model.name,
        "path": model.path,
        "role": model.role,
        "bytes_per_token": model.bytes_per_token,
        "manifest_sha256": model.manifest_sha256,
        "fingerprint": model.fingerprint,
        "recipe": manifest.get("recipe"),
        "layers": [_layer(layer) for layer in manifest.get("layers", [])],
    }


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Relative errors of one layer, as the manifest has them; None where a layer was left as it is."""
    return {
        "index": layer["index"],
        "both": layer.get("relative_error"),
        "k": (layer.get("k") or {}).get("relative_error"),
        "v": (layer.get("v") or {}).get("relative_error"),
    }


def _scores(record: Records, index: int, unit: Unit) -> list[float]:
    return [row["score"] for row in record.tasks[index].rows[: len(unit.prompts)]]


def _task_row(
    unit: Unit, record: Records, base: Records | None, index: int, margin: float, seed: int
) -> dict[str, Any]:
    scores = _scores(record, index, unit)
    other = None if base is None or base is record else _scores(base, index, unit)
    return {
        "task": unit.task,
        "length": unit.length,
        "model": record.model.name,
        "mean_length": unit.mean_length,
        **_compared(scores, other, margin, seed),
    }


def _overall_row(record: Records, base: Records | None, work: Work, margin: float, seed: int) -> dict[str, Any]:
    """All samples of all tasks together. Tasks have the same number of samples, so this is the plain mean of tasks."""
    scores = [value for index, unit in enumerate(work.units) for value in _scores(record, index, unit)]
    other = None
    if base is not None and base is not record:
        other = [value for index, unit in enumerate(work.units) for value in _scores(base, index, unit)]
    return {"model": record.model.name, **_compared(scores, other, margin, seed)}


def _compared(scores: Sequence[float], base: Sequence[float] | None, margin: float, seed: int) -> dict[str, Any]:
    low, high = mean_interval(scores)
    row: dict[str, Any] = {
        "score": task_score(scores),
        "n": len(scores),
        "ci95": [100 * low, 100 * high],
        "delta": None,
        "delta_ci95": None,
        "delta_bootstrap95": None,
        "better": None,
        "worse": None,
        "mcnemar_p": None,
        "verdict": None,
    }
    if base is not None:
        found = compare(base, scores, margin=margin, seed=seed)
        row |= {
            "delta": found.delta,
            "delta_ci95": list(found.delta_ci95),
            "delta_bootstrap95": list(found.delta_bootstrap95),
            "better": found.better,
            "worse": found.worse,
            "mcnemar_p": found.mcnemar_p,
            "verdict": found.verdict,
        }
    return row


def _perplexity(records: Sequence[Records], base: Records | None, work: Work, seed: int) -> dict[str, Any]:
    if not work.windows or work.text is None:
        return {}
    models = []
    for record in records:
        losses = [row["nll"] for row in record.perplexity.rows]
        row = {"model": record.model.name, **perplexity.summarise(losses, seed=seed)}
        if base is not None and base is not record:
            base_losses = [entry["nll"] for entry in base.perplexity.rows]
            row |= perplexity.summarise_increase(base_losses, losses, seed=seed)
        models.append(row)
    text = {"name": work.text.name, "sha256": work.text.sha256}
    return {"text": text, "window": work.window, "stride": work.stride, "models": models}


def _agreement(records: Sequence[Records], base: Records | None) -> dict[str, Any]:
    if base is None:
        return {}
    models = [
        {"model": record.model.name, **record.agreement.rows[0]}
        for record in records
        if record.agreement is not None and record.agreement.rows
    ]
    return {"baseline": base.model.name, "models": models} if models else {}


def _serving(records: Sequence[Records]) -> dict[str, Any]:
    rows = [{"model": record.model.name, **record.serving.rows[0]} for record in records if record.serving.rows]
    if not rows:
        return {}
    shared = {key: rows[0][key] for key in ("engine", "context_tokens")}
    return {**shared, "models": [{key: value for key, value in row.items() if key not in shared} for row in rows]}
