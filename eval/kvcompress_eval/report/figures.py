"""What the report shows, picked from results.json: one row per figure, one value per model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """One line of the summary table."""

    label: str
    note: str
    values: dict[str, str]
    """Formatted, by model name; models without the figure are absent."""


def summary_figures(results: Results) -> list[Figure]:
    """The figures that any of the models has, in reading order."""
    overall, base = by_model(results["overall"]), baseline(results)
    sizes = {model["name"]: model["bytes_per_token"] for model in results["models"] if model["bytes_per_token"]}
    perplexity = by_model(results["perplexity"].get("models", []))
    agreement = by_model(results["agreement"].get("models", []))
    serving = by_model(results.get("serving", {}).get("models", []))

    def size(name: str) -> str | None:
        if name not in sizes:
            return None
        ratio = sizes[base] / sizes[name] if base in sizes and name != base else None
        return f"{sizes[name]:,.0f}" + (f" ({ratio:.2f}x smaller)" if ratio else "")

    def score(name: str) -> str | None:
        return scored(overall[name]) if name in overall else None

    def loss(name: str) -> str | None:
        row = perplexity.get(name)
        if row is None:
            return None
        increase = f" ({100 * row['increase']:+.2f} %)" if "increase" in row else ""
        return f"{row['perplexity']:.3f}{increase}"

    def same(source: str) -> Callable[[str], str | None]:
        def value(name: str) -> str | None:
            row = agreement.get(name, {}).get(source)
            return None if row is None else f"{100 * row['top1']:.1f} %"

        return value

    def divergence(source: str) -> Callable[[str], str | None]:
        return lambda name: divergences(agreement.get(name, {}).get(source))

    def identical(name: str) -> str | None:
        row = agreement.get(name, {}).get("divergence")
        return f"{100 * row['identical']:.0f} % of {row['prompts']}" if row else None

    def served(key: str, digits: int) -> Callable[[str], str | None]:
        def value(name: str) -> str | None:
            found = serving.get(name, {}).get(key)
            return None if found is None else f"{found:,.{digits}f}"

        return value

    context = results.get("serving", {}).get("context_tokens")
    rows: list[tuple[str, str, Callable[[str], str | None]]] = [
        ("KV cache, bytes per token", "all layers, every scale and gain counted", size),
        ("Tokens the cache holds", "as the engine reports it, same memory", served("capacity_tokens_reported", 0)),
        ("Score", "mean over tasks, 0 to 100, with 95 % interval", score),
        ("Perplexity", "held-out text", loss),
        ("Same next token as base, text", "teacher-forced, held-out text", same("text")),
        ("KL from base, text: mean, 99 %, 99.9 %", "nats per token; answers turn in the tail", divergence("text")),
        ("Same next token as base, tasks", "on the base model's own answers", same("tasks")),
        ("KL from base, tasks: mean, 99 %, 99.9 %", "nats per token", divergence("tasks")),
        ("Answers identical to base", "greedy, token for token", identical),
        ("Decode, tokens per second", f"one sequence, after {context:,} tokens" if context else "one sequence",
         served("decode_tokens_per_s", 1)),
    ]  # fmt: skip
    names = [model["name"] for model in results["models"]]
    figures = []
    for label, note, value in rows:
        found = {name: text for name in names if (text := value(name)) is not None}
        if found:
            figures.append(Figure(label, note, found))
    return figures


def scored(row: Mapping[str, Any]) -> str:
    """A score with its interval."""
    return f"{row['score']:.1f} [{row['ci95'][0]:.1f}, {row['ci95'][1]:.1f}]"


def difference(row: Mapping[str, Any]) -> str:
    """A difference to the baseline with its interval; empty for the baseline itself."""
    if row["delta"] is None:
        return ""
    return f"{row['delta']:+.1f} [{row['delta_ci95'][0]:+.1f}, {row['delta_ci95'][1]:+.1f}]"


def divergences(row: Mapping[str, Any] | None) -> str | None:
    """Mean, 99 % and 99.9 % quantile of the KL divergence over tokens; None where it was not measured."""
    if row is None or row["kl"] is None:
        return None
    return f"{row['kl']:.4f}, {row['kl_p99']:.3f}, {row['kl_p999']:.3f}"


def by_model(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in rows}


def baseline(results: Results) -> str | None:
    """Name of the baseline model, if there is one."""
    return next((model["name"] for model in results["models"] if model["role"] == "baseline"), None)
