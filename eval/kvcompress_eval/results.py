"""From rows to results.json: scores with intervals, paired differences, verdicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvcompress_eval.breakdown import breakdown
from kvcompress_eval.environment import environment
from kvcompress_eval.models import MANIFEST, Model
from kvcompress_eval.noise import noise_floor
from kvcompress_eval.records import Records
from kvcompress_eval.scores import Settings, depth_rows, multiplicity, overall_rows, task_rows
from kvcompress_eval.tasks import perplexity
from kvcompress_eval.work import Work

FORMAT_VERSION = 2
"""Raised when a field changes its meaning or goes; new ones may come without. 1: verdicts without multiplicity."""


def summarise(
    records: Sequence[Records],
    work: Work,
    *,
    margin: float,
    seed: int,
    how: Mapping[str, Any],
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
        "agreement": _agreement(records, base),
        "drift": _drift(records),
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


def _drift(records: Sequence[Records]) -> dict[str, Any]:
    """Distance from the baseline by position: along its own generation, else on the held-out text of the agreement."""
    measured = {record.model.name: row for record in records if record.agreement for row in record.agreement.rows}
    if any("drift" in row for row in measured.values()):
        curves = {name: row["drift"]["points"] for name, row in measured.items() if "drift" in row}
        return _curves("the baseline's own generation", curves)
    return _curves("held-out text", {name: row["positions"] for name, row in measured.items() if "positions" in row})


def _curves(source: str, points: Mapping[str, Any]) -> dict[str, Any]:
    models = [{"model": name, "points": curve} for name, curve in points.items()]
    return {"source": source, "models": models} if models else {}


def _agreement(records: Sequence[Records], base: Records | None) -> dict[str, Any]:
    if base is None:
        return {}
    models = [
        {"model": record.model.name}
        | {key: value for key, value in record.agreement.rows[0].items() if key not in ("positions", "drift")}
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
