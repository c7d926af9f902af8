"""From results.json to one HTML file that needs no network."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from kvcompress_eval.report.figures import (
    Results,
    baseline,
    by_model,
    difference,
    divergences,
    scored,
    summary_figures,
)
from kvcompress_eval.report.heat import depth_maps, task_map
from kvcompress_eval.report.plots import Line, Point, drift, forest, layer_errors, pareto
from kvcompress_eval.report.wording import measured_sentence, notes, tail_sentence, verdict_sentence

MINUS = "\N{MINUS SIGN}"

MOST_UNFOLDED = 4
"""Models whose long tables are shown without a click."""

MOST_WITH_SIDES = 3
"""Models whose errors are drawn for keys and values apart."""


def write_report(results: Results, path: str | Path) -> None:
    """Render into a file."""
    from kvcompress.checkpoint.atomic import atomic_write

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(Path(path), render(results).encode())


def render(results: Results, *, title: str = "KV cache compression, measured") -> str:
    """The report as HTML.

    Args:
        results: what `run` returned, or results.json read back. `serving` may come from elsewhere.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("kvcompress_eval.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    models = results["models"]
    colours = {model["name"]: index for index, model in enumerate(models)}
    base = baseline(results)
    plots = {
        "pareto": _pareto(results, colours),
        "drift": _drift(results, colours),
        "layers": _layers(results, colours),
    }
    return environment.get_template("page.html.j2").render(
        title=title,
        headline=_headline(results),
        results=results,
        models=models,
        colours=colours,
        base=base,
        verdicts=_verdicts(results, colours),
        figures=summary_figures(results),
        tasks=_tasks(results, colours),
        plots={name: Markup(plot) if plot else None for name, plot in plots.items()},
        sides=_sides(results),
        task_map=task_map(results),
        depth_maps=depth_maps(results),
        notes=notes(results),
        measured=measured_sentence(results),
        text_kinds=_text_kinds(results),
        crowded=len(models) > MOST_UNFOLDED,
        forest=lambda **values: Markup(forest(**values)),
        recipes={model["name"]: json.dumps(model["recipe"], indent=2) for model in models if model["recipe"]},
        environment=_flat(results["environment"]),
    )


def _headline(results: Results) -> str:
    candidates = [model for model in results["models"] if model["role"] == "candidate"]
    base = next((model for model in results["models"] if model["role"] == "baseline"), None)
    if not candidates or base is None:
        return f"{results['models'][0]['name']}, measured"
    if len(candidates) == 1:
        return f"{candidates[0]['name']} against {base['name']}" + _times(
            base, candidates[0], ": a KV cache {} smaller"
        )
    cleared = {row["model"] for row in results["overall"] if row["verdict"] == "not worse"}
    kept = [model for model in candidates if model["name"] in cleared]
    if not kept:
        counts = Counter(row["verdict"] for row in results["overall"] if row["verdict"])
        told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("worse", "undecided") if counts[verdict])
        return f"{len(candidates)} candidates against {base['name']}" + (f": {told}" if told else "")
    smallest = min(kept, key=lambda model: model["bytes_per_token"] or float("inf"))
    size = _times(base, smallest, ", with a cache {} smaller")
    return (
        f"{len(kept)} of {len(candidates)} are not worse than {base['name']}; the smallest is {smallest['name']}{size}"
    )


def _times(base: dict[str, Any], candidate: dict[str, Any], text: str) -> str:
    sizes = base["bytes_per_token"], candidate["bytes_per_token"]
    return text.format(f"{sizes[0] / sizes[1]:.1f} times") if all(sizes) else ""


def _verdicts(results: Results, colours: dict[str, int]) -> list[dict[str, Any]]:
    """One card per compared model."""
    sizes = {
        model["name"]: f"{model['bytes_per_token']:,.0f} bytes per token"
        for model in results["models"]
        if model["bytes_per_token"]
    }
    agreement = by_model(results["agreement"].get("models", []))
    return [
        {
            "model": row["model"],
            "colour": colours[row["model"]],
            "verdict": row["verdict"],
            "sentence": verdict_sentence(row, results["margin"], results["multiplicity"]["overall"]),
            "tail": tail_sentence(agreement.get(row["model"], {}).get("text")),
            "size": sizes.get(row["model"], ""),
            "score": scored(row),
            "difference": difference(row).replace("-", MINUS),
        }
        for row in results["overall"]
        if row["verdict"]
    ]


def _tasks(results: Results, colours: dict[str, int]) -> list[dict[str, Any]]:
    """One group per task and length; within it one row per model."""
    rows = results["tasks"]
    noise = {(row["task"], row["length"]): row["delta"] for row in results["noise_floor"].get("tasks", [])}
    bounds = [abs(bound) for row in rows if row["delta_ci95"] for bound in row["delta_ci95"]]
    reach = min(100.0, 1.05 * max([*bounds, 2 * results["margin"]]))
    groups: list[dict[str, Any]] = []
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows):
        found = [row for row in rows if (row["task"], row["length"]) == (task, length)]
        groups.append(
            {
                "task": task,
                "length": length,
                "n": found[0]["n"],
                "rows": [
                    {
                        "model": row["model"],
                        "colour": colours[row["model"]],
                        "score": scored(row),
                        "difference": difference(row).replace("-", MINUS),
                        "noise": f"{noise[task, length]:+.1f} on other prompts".replace("-", MINUS)
                        if row["delta"] is None and (task, length) in noise
                        else "",
                        "verdict": row["verdict"],
                        "plot": row["delta"] is not None
                        and {
                            "delta": row["delta"],
                            "low": row["delta_ci95"][0],
                            "high": row["delta_ci95"][1],
                            "margin": results["margin"],
                            "reach": reach,
                            "colour": colours[row["model"]],
                        },
                    }
                    for row in found
                ],
            }
        )
    return groups


def _text_kinds(results: Results) -> list[dict[str, Any]]:
    """One row per kind of text: perplexity and divergence of every model."""
    losses = {
        (row["model"], kind["kind"]): kind
        for row in results["perplexity"].get("models", [])
        for kind in row.get("kinds", [])
    }
    agreed = {
        (row["model"], kind["kind"]): kind
        for row in results["agreement"].get("models", [])
        for kind in row.get("text", {}).get("kinds", [])
    }
    cells = {key: _text_cell(loss, agreed.get(key)) for key, loss in losses.items()}
    kinds = dict.fromkeys(kind for _, kind in losses)
    return [
        {"kind": kind, "cells": {model: cell for (model, of), cell in cells.items() if of == kind}} for kind in kinds
    ]


def _text_cell(loss: dict[str, Any], agreed: dict[str, Any] | None) -> str:
    increase = f" ({100 * loss['increase']:+.2f} %)".replace("-", MINUS) if loss.get("increase") is not None else ""
    found = divergences(agreed)
    return f"{loss['perplexity']:.3f}{increase}" + (f"; KL {found}" if found else "")


def _pareto(results: Results, colours: dict[str, int]) -> str | None:
    overall = by_model(results["overall"])
    points = [
        Point(
            name=model["name"],
            colour=colours[model["name"]],
            x=model["bytes_per_token"],
            y=overall[model["name"]]["score"],
            low=overall[model["name"]]["ci95"][0],
            high=overall[model["name"]]["ci95"][1],
            is_base=model["role"] == "baseline",
        )
        for model in results["models"]
        if model["bytes_per_token"] and model["name"] in overall
    ]
    return pareto(points) if len(points) > 1 else None


def _sides(results: Results) -> dict[str, bool]:
    """Which errors to draw, and whether dashed: of keys and values apart, or of both where that is too many lines."""
    measured = sum(bool(model["layers"]) for model in results["models"])
    return {"k": False, "v": True} if measured <= MOST_WITH_SIDES else {"both": False}


def _layers(results: Results, colours: dict[str, int]) -> str | None:
    lines = [
        Line(colours[model["name"]], dashed, [layer[side] for layer in model["layers"]], range(len(model["layers"])))
        for model in results["models"]
        for side, dashed in _sides(results).items()
        if any(layer[side] is not None for layer in model["layers"])
    ]
    return layer_errors(lines) if lines else None


def _drift(results: Results, colours: dict[str, int]) -> str | None:
    curves = results["drift"].get("models", [])
    if not curves:
        return None
    measured = {curve["model"]: [point for point in curve["points"] if point["kl"] is not None] for curve in curves}
    lines = [
        Line(colours[model], False, [point["kl"] for point in points], [point["position"] for point in points])
        for model, points in measured.items()
        if points
    ]
    if not lines:
        return None
    return drift(lines, max(1.0, 1.05 * max(line.positions[-1] for line in lines)))


def _flat(values: Results) -> list[tuple[str, str]]:
    """Nested settings as lines."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [(f"{key}: {name}" if key != "packages" else name, text) for name, text in _flat(value)]
        elif value is not None:
            lines.append((key.replace("_", " "), str(value)))
    return lines
