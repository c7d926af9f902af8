"""Long-decode drift: how far a candidate is from its base at each position of the base's own long generation.

Both are fed the base's greedy continuation, so that a difference is the stored cache's and not a diverged text's.
Positions are grouped in buckets that double in width: an error that adds up with every stored token shows as a KL that
grows from bucket to bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvcompress_eval.engines.base import Engine, Scores
from kvcompress_eval.statistics import bootstrap_interval
from kvcompress_eval.tasks.divergence import kl_rows

FIRST_BUCKET = 16
ROWS_PER_BUCKET = 32
"""Positions per bucket and prompt whose whole distributions are compared. At 32,768 tokens and a vocabulary of 128,256
these take 0.2 GiB per prompt, where all positions would take 16 GiB."""


@dataclass(frozen=True)
class Continued:
    """A prompt with the base's continuation, and the base's scores of it."""

    tokens: tuple[int, ...]
    context: int
    rows: list[int]
    """Entries of the scores that have a distribution."""
    scores: Scores


def collect_reference(
    engine: Engine, prompts: Sequence[list[int]], new_tokens: int, *, progress: Callable[[int, int], None]
) -> list[Continued]:
    """Let the base continue each prompt by `new_tokens`, past the end of sequence, and score what it wrote."""
    found = []
    for prompt in prompts:
        tokens = (*prompt, *engine.generate([prompt], new_tokens, ignore_end=True)[0].tokens)
        rows = [len(prompt) - 1 + at for at in compared(len(tokens) - len(prompt))]
        scores = engine.score(tokens, distribution=engine.vocabulary is not None, rows=rows)
        found.append(Continued(tokens, len(prompt), rows, scores))
        progress(len(found), len(prompts))
    return found


def measure(
    engine: Engine, reference: Sequence[Continued], *, seed: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """A candidate's distance from the base by position.

    Returns:
        prompts, new_tokens, and `points`, one per bucket: position and end (counted from the end of the prompt),
        tokens, top1 (share of equal most probable tokens), nll_increase (nats per token of the base's text), kl (mean
        KL(base || candidate) in nats, None where the engine has no distributions) with its interval over positions,
        and their number kl_tokens.
    """
    same: list[np.ndarray[Any, Any]] = []
    losses: list[np.ndarray[Any, Any]] = []
    divergences: list[tuple[int, float]] = []
    for done, item in enumerate(reference, start=1):
        base = item.scores
        whole = base.distribution_TV is not None and engine.vocabulary is not None
        scored = engine.score(item.tokens, distribution=whole, rows=item.rows)
        start = item.context - 1
        same.append(scored.top1_T[start:] == base.top1_T[start:])
        losses.append((base.log_probs_T[start:] - scored.log_probs_T[start:]).astype(float))
        if base.distribution_TV is not None and scored.distribution_TV is not None:
            values = kl_rows(base.distribution_TV, scored.distribution_TV)
            divergences += zip((row - start for row in item.rows), values.tolist(), strict=True)
        progress(done, len(reference))
    longest = max(len(row) for row in same)
    return {
        "prompts": len(reference),
        "new_tokens": longest,
        "points": [_point(span, same, losses, divergences, seed) for span in buckets(longest)],
    }


def _point(
    span: tuple[int, int],
    same: Sequence[np.ndarray[Any, Any]],
    losses: Sequence[np.ndarray[Any, Any]],
    divergences: Sequence[tuple[int, float]],
    seed: int,
) -> dict[str, Any]:
    start, end = span
    hits = np.concatenate([row[start:end] for row in same])
    kl = np.array([value for at, value in divergences if start <= at < end])
    interval = bootstrap_interval(kl[:, None], statistic=lambda means: means[:, 0], seed=seed) if len(kl) else None
    return {
        "position": start,
        "end": end,
        "tokens": len(hits),
        "top1": float(hits.mean()),
        "nll_increase": float(np.concatenate([row[start:end] for row in losses]).mean()),
        "kl": float(kl.mean()) if len(kl) else None,
        "kl_ci95": list(interval) if interval is not None else None,
        "kl_tokens": len(kl),
    }


def buckets(length: int) -> list[tuple[int, int]]:
    """Spans [start, end) that double in width and end at `length`: 0 to 16, to 32, to 64, and so on."""
    edges = [0]
    edge = FIRST_BUCKET
    while edge < length:
        edges.append(edge)
        edge *= 2
    return list(zip(edges, [*edges[1:], length], strict=True))


def compared(length: int) -> list[int]:
    """Positions, evenly spread over each bucket, whose distributions are compared."""
    spread = (np.linspace(start, end - 1, min(ROWS_PER_BUCKET, end - start)) for start, end in buckets(length))
    return [round(at) for part in spread for at in part]
