"""How closely a compressed model follows its base: same most probable token, KL divergence, first divergence.

Teacher-forced over the same tokens: held-out text, and the base model's own greedy continuations of task prompts. The
first divergence compares free-running greedy continuations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompress_eval.engines.base import Engine, Scores
from kvcompress_eval.statistics import bootstrap_interval
from kvcompress_eval.tasks.divergence import kl_rows
from kvcompress_eval.tasks.drift import Continued

MAX_DISTRIBUTION_BYTES = 2**30
"""The base model's distributions wait in memory for the candidates; beyond this the KL covers fewer sequences."""

BUCKET = 64
"""Tokens per point of the curve over positions."""

Curve = tuple[NDArray[np.float64], NDArray[np.bool_]]
"""Of one sequence: KL of each token, and whether the most probable token is the same."""


@dataclass(frozen=True)
class Scored:
    """Tokens to score, of which the first `context` are only context."""

    tokens: tuple[int, ...]
    context: int
    source: str
    """text or tasks."""


@dataclass(frozen=True)
class Reference:
    """What the base model said: the sequences, its scores on them, and its continuations of the prompts."""

    sequences: list[Scored]
    scores: list[Scores]
    prompts: list[list[int]]
    continuations: list[tuple[int, ...]]
    drift: list[Continued] = field(default_factory=list)


def collect_reference(
    engine: Engine,
    texts: Sequence[Sequence[int]],
    prompts: Sequence[list[int]],
    *,
    new_tokens: int,
    progress: Callable[[int, int], None],
) -> Reference:
    """Run the base model: continue each prompt by `new_tokens`, then score the texts and the continued prompts."""
    total = 2 * len(prompts) + len(texts)
    continuations: list[tuple[int, ...]] = []
    for prompt in prompts:
        continuations.append(engine.generate([prompt], new_tokens)[0].tokens)
        progress(len(continuations), total)
    sequences = [Scored(tuple(text), 1, "text") for text in texts]
    sequences += [
        Scored((*prompt, *continuation), len(prompt), "tasks")
        for prompt, continuation in zip(prompts, continuations, strict=True)
        if continuation
    ]
    scores: list[Scores] = []
    held_bytes = 0
    for sequence in sequences:
        whole = engine.has_distribution and held_bytes < MAX_DISTRIBUTION_BYTES
        scored = cut(engine.score(sequence.tokens, distribution=whole), sequence.context)
        held_bytes += 0 if scored.distribution_TV is None else scored.distribution_TV.nbytes
        scores.append(scored)
        progress(len(continuations) + len(scores), total)
    return Reference(sequences, scores, list(prompts), continuations)


def cut(scores: Scores, context: int) -> Scores:
    """Scores of the tokens after the first `context`."""
    start = context - 1
    distribution = scores.distribution_TV
    return Scores(
        scores.log_probs_T[start:],
        scores.top1_T[start:],
        None if distribution is None else distribution[start:].copy(),
    )


def measure(
    engine: Engine,
    reference: Reference,
    *,
    new_tokens: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Agreement of a candidate with the reference.

    Returns:
        per source (`text`, `tasks`): tokens, top1 (share of equal most probable tokens) with interval, kl (mean
        KL(base || candidate) in nats per token, None where the engine has no distributions) with interval; and
        `divergence`: prompts, identical (share of equal continuations), median_first (tokens before the first
        difference, a continuation without one counting in full); and `positions`: agreement on the text by position.
    """
    total = len(reference.sequences) + len(reference.prompts)
    rows: dict[str, list[tuple[int, int, float]]] = {}
    curves: list[Curve] = []
    done = 0
    for sequence, base in zip(reference.sequences, reference.scores, strict=True):
        whole = base.distribution_TV is not None and engine.has_distribution
        scored = cut(engine.score(sequence.tokens, distribution=whole), sequence.context)
        same_T = scored.top1_T == base.top1_T
        kl = float("nan")
        if base.distribution_TV is not None and scored.distribution_TV is not None:
            kl_T = kl_rows(base.distribution_TV, scored.distribution_TV)
            kl = float(kl_T.sum())
            if sequence.source == "text":
                curves.append((kl_T, same_T))
        rows.setdefault(sequence.source, []).append((int(same_T.sum()), len(same_T), kl))
        done += 1
        progress(done, total)
    firsts = []
    for prompt, expected in zip(reference.prompts, reference.continuations, strict=True):
        firsts.append(first_difference(expected, engine.generate([prompt], new_tokens)[0].tokens))
        done += 1
        progress(done, total)
    result: dict[str, Any] = {source: _summary(found, seed) for source, found in rows.items()}
    if curves:
        result["positions"] = by_position(curves)
    if firsts:
        pairs = zip(firsts, reference.continuations, strict=True)
        lengths = [len(expected) if at is None else at for at, expected in pairs]
        result["divergence"] = {
            "prompts": len(firsts),
            "identical": sum(at is None for at in firsts) / len(firsts),
            "median_first": float(np.median(lengths)),
            "new_tokens": new_tokens,
        }
    return result


def by_position(curves: Sequence[Curve], bucket: int = BUCKET) -> list[dict[str, Any]]:
    """Mean KL and share of equal most probable tokens over all sequences, in buckets of positions."""
    points = []
    for start in range(0, max(len(kl_T) for kl_T, _ in curves), bucket):
        kl, same = (np.concatenate([curve[side][start : start + bucket] for curve in curves]) for side in (0, 1))
        points.append({"position": start, "tokens": len(kl), "kl": float(kl.mean()), "top1": float(same.mean())})
    return points


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """Tokens before the two continuations part; None if they are the same."""
    for at, (a, b) in enumerate(zip(expected, found, strict=False)):
        if a != b:
            return at
    return None if len(expected) == len(found) else min(len(expected), len(found))


def _summary(rows: list[tuple[int, int, float]], seed: int) -> dict[str, Any]:
    table = np.array(rows, float)
    top1 = table[:, :2]
    kl = table[~np.isnan(table[:, 2])][:, [2, 1]]

    def ratio(means: Any) -> Any:
        return means[:, 0] / means[:, 1]

    return {
        "tokens": int(table[:, 1].sum()),
        "top1": float(top1[:, 0].sum() / top1[:, 1].sum()),
        "top1_ci95": list(bootstrap_interval(top1, statistic=ratio, seed=seed)),
        "kl": float(kl[:, 0].sum() / kl[:, 1].sum()) if len(kl) else None,
        "kl_ci95": list(bootstrap_interval(kl, statistic=ratio, seed=seed)) if len(kl) else None,
    }
