"""How closely a compressed model follows its base: same most probable token, KL divergence, first divergence.

Teacher-forced over the same tokens: windows of held-out text, and the base model's own greedy continuations of task
prompts. The first divergence compares free-running greedy continuations.

A mean hides rare tokens at which a model goes wrong, and these decide answers: the 99 % and 99.9 % quantiles of the KL
divergence over tokens stand beside it, with the number of tokens that they rest on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompress_eval.engines.base import Engine, Scores
from kvcompress_eval.statistics import bootstrap_interval
from kvcompress_eval.tasks.divergence import kl_rows
from kvcompress_eval.tasks.drift import Continued
from kvcompress_eval.tasks.perplexity import Window

MAX_DISTRIBUTION_BYTES = 2**31
"""The base model's distributions wait in memory for the candidates; where they would take more than this, they are
compared at as many tokens as fit, evenly spread."""

BUCKET = 64
"""Tokens per point of the curve over positions."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Tokens to score: all of them, of which the last `scored` count, and the distributions of `rows` are compared."""

    tokens: tuple[int, ...]
    scored: int
    rows: list[int]
    """Entries of the scores, in rising order."""


@dataclass(frozen=True)
class Reference:
    """What the base model said: of text, and its continuations of prompts with its scores of them."""

    texts: Mapping[int, tuple[Part, Scores]] = field(default_factory=dict)
    """By number of the window."""
    prompts: list[list[int]] = field(default_factory=list)
    continuations: list[tuple[int, ...]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    """One per part: a prompt that was continued."""
    drift: list[Continued] = field(default_factory=list)


def parts(sequences: Sequence[tuple[tuple[int, ...], int]], vocabulary: int | None) -> list[Part]:
    """Token sequences, of which the last so many count, with the rows whose distributions fit into memory together.

    Args:
        vocabulary: size of a distribution; None where the engine has none.
    """
    total = sum(scored for _, scored in sequences)
    room = MAX_DISTRIBUTION_BYTES // (4 * vocabulary) if vocabulary else 0
    share = min(1.0, room / total) if total else 0.0
    return [Part(tokens, scored, _spread(len(tokens) - 1, scored, share)) for tokens, scored in sequences]


def _spread(entries: int, scored: int, share: float) -> list[int]:
    """A share of the last `scored` of the entries, evenly spread."""
    count = scored if share == 1.0 else int(share * scored)
    return [entries - scored + (at * scored) // count for at in range(count)]


def text_rows(
    engine: Engine,
    windows: Sequence[Window],
    numbers: Iterable[int],
    *,
    reference: Reference | None = None,
    keep: dict[int, tuple[Part, Scores]] | None = None,
) -> Iterator[Row]:
    """Score the windows of these numbers, each once: a row per window.

    A row has the `kind` of text and `nll`, the loss in nats of each token that counts; where a reference is given also
    `same` (1 where the most probable token is the base's), `kl` (nats per token, where both engines have distributions)
    and `kl_at`, the places of these among the tokens that count.

    Args:
        keep: where the scores go that candidates will be compared with; distributions are taken only for that.
    """
    vocabulary = engine.vocabulary if keep is not None else None
    wanted = parts([(window.tokens, window.scored) for window in windows], vocabulary)
    for number in numbers:
        window, part = windows[number], wanted[number]
        base = None
        if reference is not None:
            compared, base = reference.texts[number]
            part = part if engine.vocabulary is None else compared
        scored = engine.score(window.tokens, distribution=bool(part.rows), rows=part.rows)
        first = len(window.tokens) - 1 - window.scored
        row: Row = {"window": number, "kind": window.kind}
        row["nll"] = [round(float(-value), 6) for value in scored.log_probs_T[first:]]
        if base is not None:
            row["same"] = (scored.top1_T[first:] == base.top1_T[first:]).astype(int).tolist()
            kl_T = _divergences(base, scored)
            row["kl"] = [float(f"{value:.6g}") for value in kl_T]
            row["kl_at"] = [at - first for at in part.rows][: len(kl_T)]
        if keep is not None:
            keep[number] = part, scored
        yield row


def _divergences(base: Scores, other: Scores) -> NDArray[np.float64]:
    if base.distribution_TV is None or other.distribution_TV is None:
        return np.zeros(0)
    found: NDArray[np.float64] = kl_rows(base.distribution_TV, other.distribution_TV)
    return found


def collect_reference(
    engine: Engine, prompts: Sequence[list[int]], *, new_tokens: int, progress: Callable[[int, int], None]
) -> Reference:
    """Let the base model continue each prompt by `new_tokens`, then score what it wrote."""
    total = 2 * len(prompts)
    continuations: list[tuple[int, ...]] = []
    for prompt in prompts:
        continuations.append(engine.generate([prompt], new_tokens)[0].tokens)
        progress(len(continuations), total)
    made = [((*prompt, *said), len(said)) for prompt, said in zip(prompts, continuations, strict=True) if said]
    sequences = parts(made, engine.vocabulary)
    scores: list[Scores] = []
    for part in sequences:
        scores.append(engine.score(part.tokens, distribution=bool(part.rows), rows=part.rows))
        progress(len(continuations) + len(scores), total)
    progress(total, total)
    return Reference(prompts=list(prompts), continuations=continuations, parts=sequences, scores=scores)


def measure(
    engine: Engine, reference: Reference, *, new_tokens: int, seed: int, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Agreement of a candidate with the base's continuations of prompts.

    Returns:
        `tasks`, as `summarise` gives it; and `divergence`: prompts, identical (share of equal continuations),
        median_first (tokens before the first difference, a continuation without one counting in full).
    """
    if not reference.prompts:
        return {}
    total = len(reference.parts) + len(reference.prompts)
    rows: list[Row] = []
    for part, base in zip(reference.parts, reference.scores, strict=True):
        whole = base.distribution_TV is not None and engine.vocabulary is not None
        scored = engine.score(part.tokens, distribution=whole, rows=part.rows)
        same = scored.top1_T[-part.scored :] == base.top1_T[-part.scored :]
        rows.append({"same": same.astype(int).tolist(), "kl": _divergences(base, scored).tolist()})
        progress(len(rows), total)
    firsts = []
    for prompt, expected in zip(reference.prompts, reference.continuations, strict=True):
        firsts.append(first_difference(expected, engine.generate([prompt], new_tokens)[0].tokens))
        progress(len(rows) + len(firsts), total)
    pairs = zip(firsts, reference.continuations, strict=True)
    lengths = [len(expected) if at is None else at for at, expected in pairs]
    result: dict[str, Any] = {"tasks": summarise(rows, seed=seed)} if rows else {}
    result["divergence"] = {
        "prompts": len(firsts),
        "identical": sum(at is None for at in firsts) / len(firsts),
        "median_first": float(np.median(lengths)),
        "new_tokens": new_tokens,
    }
    return result


def by_position(rows: Sequence[Row], starts: Sequence[int], bucket: int = BUCKET) -> list[Row]:
    """Mean KL and share of equal most probable tokens over all windows, in buckets of positions.

    Args:
        starts: position in its window of each row's first token that counts.
    """
    at, same, kl_at, kl = (
        np.concatenate([np.asarray(part, float) for part in found])
        for found in (
            [start + np.arange(len(row["same"])) for row, start in zip(rows, starts, strict=True)],
            [row["same"] for row in rows],
            [start + np.asarray(row["kl_at"], float) for row, start in zip(rows, starts, strict=True)],
            [row["kl"] for row in rows],
        )
    )
    points = []
    for position in range(0, int(at.max()) + 1, bucket):
        here, compared = (position <= at) & (at < position + bucket), (position <= kl_at) & (kl_at < position + bucket)
        if here.any() and compared.any():
            point = {"position": position, "tokens": int(here.sum())}
            points.append({**point, "kl": float(kl[compared].mean()), "top1": float(same[here].mean())})
    return points


def first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """Tokens before the two continuations part; None if they are the same."""
    for at, (a, b) in enumerate(zip(expected, found, strict=False)):
        if a != b:
            return at
    return None if len(expected) == len(found) else min(len(expected), len(found))


def summarise(rows: Sequence[Row], *, seed: int) -> Row:
    """Agreement over windows or continuations (`same` and `kl` in each row): tokens, top1 (share of equal most probable
    tokens) and kl (mean KL(base || candidate) in nats per token) with bootstrap intervals over rows, quantiles of the
    KL over tokens, and the number of tokens they rest on. The KL is None where an engine has no distributions.
    """
    top1 = np.array([[sum(row["same"]), len(row["same"])] for row in rows], float)
    kl = np.array([[sum(row["kl"]), len(row["kl"])] for row in rows if row["kl"]], float)
    values = np.concatenate([np.asarray(row["kl"], float) for row in rows])

    def ratio(means: Any) -> Any:
        return means[:, 0] / means[:, 1]

    return {
        "tokens": int(top1[:, 1].sum()),
        "top1": float(top1[:, 0].sum() / top1[:, 1].sum()),
        "top1_ci95": list(bootstrap_interval(top1, statistic=ratio, seed=seed)),
        "kl": float(values.mean()) if len(values) else None,
        "kl_ci95": list(bootstrap_interval(kl, statistic=ratio, seed=seed)) if len(values) else None,
        "kl_p99": float(np.quantile(values, 0.99)) if len(values) else None,
        "kl_p999": float(np.quantile(values, 0.999)) if len(values) else None,
        "kl_tokens": len(values),
    }
