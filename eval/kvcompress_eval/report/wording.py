"""What the report says in words: verdicts, and what all figures rest on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcompress_eval.report.figures import Results

FEW = 10
"""Tokens above a quantile, from which on it is steady enough to stand without a remark."""


def verdict_sentence(row: Mapping[str, Any], margin: float, family: int = 1) -> str:
    """What a verdict says, in words.

    Args:
        family: number of verdicts that hold together.
    """
    low, high = row["delta_ci95"]
    sure = "95 % confidence" if family == 1 else f"95 % confidence for all {family} verdicts together"
    basis = f"({sure}, {row['n']:,} paired samples)"
    if row["verdict"] == "not worse":
        return f"Not worse than the base model by more than {points(margin)} {basis}."
    if row["verdict"] == "worse":
        open_margin = "" if high < -margin else f"; whether it stays within {points(margin)} is open"
        return f"Worse than the base model: it loses {-high:.1f} to {-low:.1f} points{open_margin} {basis}."
    text = f"Undecided at a margin of {points(margin)}: the difference lies {_between(low, high)} points {basis}."
    alone = "not worse" if low > -margin else "worse" if high < 0 else None
    if alone:
        return f"{text} On its own this would be '{alone}'; beside {family - 1} others it may be chance."
    return f"{text} More samples narrow this."


def tail_sentence(row: Mapping[str, Any] | None) -> str:
    """How far the next-token distribution of a model is from the base's, its tail included; empty if not measured.

    Args:
        row: agreement on held-out text, as `results.json` has it.
    """
    if row is None or row["kl"] is None:
        return ""
    return f"KL divergence on text {row['kl']:.2g} nats, 99.9 %: {row['kl_p999']:.2g} nats{_rests_on(row)}."


def _rests_on(row: Mapping[str, Any]) -> str:
    """What the 99.9 % quantile rests on, where that is so little that it should be said."""
    above = round(row["kl_tokens"] / 1000)
    if above >= FEW:
        return ""
    tokens = f"{row['kl_tokens']:,} tokens"
    return f" (of {tokens}: the largest, more or less)" if above < 2 else f" (the {above} largest of {tokens})"


def measured_sentence(results: Results) -> str:
    """In one line, what was measured: tasks, samples, text, engines, precision, time."""
    environment, rows = results["environment"], results["tasks"]
    parts = []
    if rows:
        one = [row for row in rows if row["model"] == rows[0]["model"]]
        lengths = ", ".join(f"{length:,}" for length in sorted({row["length"] for row in rows}))
        tasks, samples = len({row["task"] for row in rows}), sum(row["n"] for row in one)
        parts.append(
            f"{_count(tasks, 'task')}, {_count(samples, 'sample')} at {lengths} tokens "
            f"(template {environment['template']})"
        )
    texts = results["perplexity"]
    if texts:
        kinds = len(texts["texts"])
        named = texts["texts"][0]["name"] if kinds == 1 else f"{kinds} kinds"
        parts.append(f"{texts['models'][0]['tokens']:,} tokens of text ({named})")
    if results["drift"] and not texts:
        parts.append("agreement by position")
    engine, other = environment["engine"], environment["text_engine"]
    engines = f"engine {engine}" if engine == other else f"engines {engine} (tasks) and {other} (text)"
    minutes = f", {environment['minutes']:.1f} minutes" if "minutes" in environment else ""
    return f"measured: {'; '.join(parts)}; {engines}, {environment['computed_in']}{minutes}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def points(number: float) -> str:
    return f"{number:g} point" + ("" if number == 1 else "s")


def _between(low: float, high: float) -> str:
    return (
        f"between a loss of {-low:.1f} and a loss of {-high:.1f}" if high < 0 else f"between {low:+.1f} and {high:+.1f}"
    )


def notes(results: Results) -> list[str]:
    """What holds for all figures: how they were measured, and how sure the verdicts are."""
    environment, families = results["environment"], results["multiplicity"]
    lengths = sorted({row["length"] for row in results["tasks"]})
    found = []
    if lengths:
        tasks = len({row["task"] for row in results["tasks"]})
        where = ", ".join(f"{length:,}" for length in lengths)
        found.append(
            f"{tasks} task{'s' * (tasks != 1)} at {where} tokens, {results['overall'][0]['n']:,} samples in all, seed "
            f"{results['seed']}, engine {environment['engine']}, {environment['computed_in']}. "
            "Every model saw the same prompts."
        )
    if families["overall"]:
        found.append(
            f"Verdicts tolerate a loss of {points(results['margin'])}. "
            f"The chance that any of the {families['overall']} over all tasks is wrong is at most "
            f"{100 * families['alpha']:g} % (Holm), and likewise for the {families['tasks']} on single tasks. "
            "Intervals are of single comparisons."
        )
    compared = [row["text"] for row in results["agreement"].get("models", []) if "text" in row]
    if compared and compared[0]["kl"] is not None:
        tokens = compared[0]["kl_tokens"]
        found.append(
            f"KL divergence of the base model's next token from the candidate's over {tokens:,} tokens of text; above "
            f"its 99 % and 99.9 % quantiles lie {round(tokens / 100):,} and {round(tokens / 1000):,} of them."
        )
    floor = results["noise_floor"]
    if floor:
        low, high = floor["overall"]["ci95"]
        first, second = floor["seeds"]
        found.append(
            f"Noise floor: {floor['model']} on other prompts, seed {second} against seed {first}, differs by "
            f"{floor['overall']['delta']:+.1f} points [{low:+.1f}, {high:+.1f}] overall and by {floor['rms']:.1f} "
            "points per task (root mean square). Scores measured on different prompts cannot be told apart below "
            "that; the differences here are paired on the same prompts and free of it."
        )
    return found
