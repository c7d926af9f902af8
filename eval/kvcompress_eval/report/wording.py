"""What the report says in words: verdicts, and what all figures rest on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcompress_eval.report.figures import Results


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
            f"{results['seed']}, engine {environment['engine']}, dtype {environment['dtype']}. "
            "Every model saw the same prompts."
        )
    if families["overall"]:
        found.append(
            f"Verdicts tolerate a loss of {points(results['margin'])}. "
            f"The chance that any of the {families['overall']} over all tasks is wrong is at most "
            f"{100 * families['alpha']:g} % (Holm), and likewise for the {families['tasks']} on single tasks. "
            "Intervals are of single comparisons."
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
