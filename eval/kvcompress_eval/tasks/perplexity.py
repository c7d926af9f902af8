"""Perplexity of a text with a sliding window: every token is scored once, with as much context as the window allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompress_eval.statistics import bootstrap_interval


@dataclass(frozen=True)
class Window:
    """Tokens handed to the model, and how many of the last ones count."""

    tokens: tuple[int, ...]
    scored: int
    kind: str = ""
    """Of text."""


def windows(
    tokens: Sequence[int], window: int, stride: int, prefix: Sequence[int] = (), kind: str = ""
) -> Iterator[Window]:
    """Cut a text into windows of at most `window` tokens, `prefix` included, that advance by `stride`.

    The first window scores all it can; each later one scores the tokens that no window before it did, at most `stride`
    of them, with the tokens before them as context. Every window starts with `prefix`, the tokens that a prompt of this
    tokenizer starts with. Without one, the text's first token has no context and is not scored.

    Raises:
        ValueError: a stride or window that leaves tokens out.
    """
    room = window - len(prefix)
    if not 1 <= stride <= room or room < 2:
        raise ValueError(f"stride {stride} does not fit a window of {window} tokens with {len(prefix)} in front")
    scored_to = 0 if prefix else 1
    end = min(room, len(tokens))
    while True:
        yield Window((*prefix, *tokens[max(0, end - room) : end]), end - scored_to, kind)
        scored_to = end
        if end == len(tokens):
            return
        end = min(end + stride, len(tokens))


def summarise(losses: Sequence[Sequence[float]], *, seed: int) -> dict[str, Any]:
    """Perplexity with a bootstrap interval over windows."""
    sums = _sums(losses)
    total, tokens = sums.sum(0)
    interval = bootstrap_interval(sums, statistic=lambda m: np.exp(m[:, 0] / m[:, 1]), seed=seed)
    return {
        "perplexity": float(np.exp(total / tokens)),
        "nll": float(total / tokens),
        "ci95": list(interval),
        "tokens": int(tokens),
        "windows": len(losses),
    }


def summarise_increase(
    baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]], *, seed: int
) -> dict[str, Any]:
    """Relative increase of perplexity (0.01 is one percent), paired by window."""
    sums = _sums(baseline, candidate)
    base, other, tokens = sums.sum(0)

    def increase(means: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.expm1((means[:, 1] - means[:, 0]) / means[:, 2])

    interval = bootstrap_interval(sums, statistic=increase, seed=seed)
    return {"increase": float(np.expm1((other - base) / tokens)), "increase_ci95": list(interval)}


def _sums(*models: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Per window: the summed loss of each model, then the number of tokens."""
    return np.array([[*(sum(losses) for losses in rows), len(rows[0])] for rows in zip(*models, strict=True)], float)
