"""From rows to results.json: scores with intervals, paired differences, verdicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvcompress_eval.breakdown import breakdown
from kvcompress_eval.engines.choosing import Engines
from kvcompress_eval.environment import computed_in, environment
from kvcompress_eval.models import MANIFEST, Model
from kvcompress_eval.noise import noise_floor
from kvcompress_eval.records import Records
from kvcompress_eval.scores import Settings, depth_rows, multiplicity, overall_rows, task_rows
from kvcompress_eval.tasks import perplexity
from kvcompress_eval.tasks.agreement import by_position
from kvcompress_eval.tasks.agreement import summarise as agreed
from kvcompress_eval.work import Work

FORMAT_VERSION = 3
"""Raised when a field changes its meaning or goes; new ones may come without. 1: verdicts without multiplicity. 2: one
text, whose agreement was measured on other windows than its perplexity."""

Row = dict[str, Any]


def summarise(
    records: Sequence[Records],
    work: Work,
    *,
    margin: float,
    seed: int,
    how: Mapping[str, Any],
    engines: Engines,
    repeated: Records | None = None,
    again: Work | None = None,
) -> dict[str, Any]:
    """The content of results.json, of the shape of `schema.Results`. Scores and differences are in points, 0 to 100.

    Args:
        repeated: the first model's rows on the prompts of another seed, `again`.
    """
    base = records[0] if len(records) > 1 and records[0].model.role == "baseline" else None
    settings = Settings(margin, seed)
    overall, tasks = overall_rows(records, base, work, settings), task_rows(records, base, work, settings)
    floor = {}
    if repeated is not None and again is not None:
        floor = noise_floor(records[0], work, repeated, again, seed)
    return {
        "format_version": FORMAT_VERSION,
        "models": [_model(record.model) for record in records],
        "overall": overall,
        "tasks": tasks,
        "breakdown": breakdown(work.units, {record.model.name: record.tasks for record in records}),
        "multiplicity": multiplicity(overall, tasks),
        "noise_floor": floor,
        "depths": depth_rows(records, work),
        "skipped": [vars(item) for item in work.skipped],
        "perplexity": _perplexity(records, base, work, seed),
        "agreement": _agreement(records, base, seed),
        "drift": _drift(records, base, work),
        "serving": _serving(records),
        "margin": margin,
        "environment": {
            **environment(),
            "engine": engines.tasks,
            "text_engine": engines.text,
            "engine_reason": engines.reason,
            "computed_in": computed_in(how["dtype"]),
            **how,
        },
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


def _perplexity(records: Sequence[Records], base: Records | None, work: Work, seed: int) -> dict[str, Any]:
    if not work.windows:
        return {}
    models = []
    for record in records:
        other = None if base is None or base is record else base
        row = _losses(record.text.rows, None if other is None else other.text.rows, seed)
        kinds = [
            {"kind": kind, **_losses(rows, None if other is None else _kinds(other)[kind], seed)}
            for kind, rows in _kinds(record).items()
        ]
        models.append({"model": record.model.name, **row, "kinds": kinds})
    texts = [{"kind": text.kind, "name": text.name, "sha256": text.sha256} for text in work.texts]
    return {"texts": texts, "window": work.window, "stride": work.stride, "models": models}


def _losses(rows: Sequence[Row], base: Sequence[Row] | None, seed: int) -> dict[str, Any]:
    losses = [row["nll"] for row in rows]
    found = perplexity.summarise(losses, seed=seed)
    if base is not None:
        found |= perplexity.summarise_increase([row["nll"] for row in base], losses, seed=seed)
    return found


def _kinds(record: Records) -> dict[str, list[Row]]:
    """The rows of text by kind; nothing where there is one kind only."""
    found: dict[str, list[Row]] = {}
    for row in record.text.rows:
        found.setdefault(row["kind"], []).append(row)
    return found if len(found) > 1 else {}


def _drift(records: Sequence[Records], base: Records | None, work: Work) -> dict[str, Any]:
    """Distance from the baseline by position: along its own generation, else in the windows of held-out text."""
    measured = {record.model.name: row for record in records if record.agreement for row in record.agreement.rows}
    if any("drift" in row for row in measured.values()):
        curves = {name: row["drift"]["points"] for name, row in measured.items() if "drift" in row}
        return _curves("the baseline's own generation", curves)
    starts = [len(window.tokens) - 1 - window.scored for window in work.windows]
    return _curves(
        "held-out text",
        {
            record.model.name: points
            for record in records
            if base is not None and base is not record and record.text.rows
            if (points := by_position(record.text.rows, starts))
        },
    )


def _curves(source: str, points: Mapping[str, Any]) -> dict[str, Any]:
    models = [{"model": name, "points": curve} for name, curve in points.items()]
    return {"source": source, "models": models} if models else {}


def _agreement(records: Sequence[Records], base: Records | None, seed: int) -> dict[str, Any]:
    """Agreement of each candidate with the base: on text, in all and by kind, and on the base's answers."""
    if base is None:
        return {}
    models = []
    for record in records:
        if record is base:
            continue
        found: dict[str, Any] = {}
        if record.text.rows:
            kinds = [{"kind": kind, **agreed(rows, seed=seed)} for kind, rows in _kinds(record).items()]
            found["text"] = {**agreed(record.text.rows, seed=seed), "kinds": kinds}
        for row in record.agreement.rows if record.agreement is not None else ():
            found |= {key: value for key, value in row.items() if key != "drift"}
        if found:
            models.append({"model": record.model.name, **found})
    return {"baseline": base.model.name, "models": models} if models else {}


def _serving(records: Sequence[Records]) -> dict[str, Any]:
    rows = [{"model": record.model.name, **record.serving.rows[0]} for record in records if record.serving.rows]
    if not rows:
        return {}
    shared = {key: rows[0][key] for key in ("engine", "context_tokens")}
    return {**shared, "models": [{key: value for key, value in row.items() if key not in shared} for row in rows]}
