"""How large a haystack is: a binary search over drawn samples, then a per-sample shrink.

Every trial draws a sample and so advances the random stream, which makes the order of trials part of the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvcompress_eval.tasks.ruler.sample import NotApplicableError

MAX_REDRAWS = 200
"""At the smallest size the benchmark redraws until a sample fits; after this many misses the length is called
impossible."""


class MissedDrawError(ValueError):
    """A draw from which no sample can be made; another one can. Counts as a sample that does not fit."""


@dataclass(frozen=True)
class Drawn:
    """A drawn prompt, its answers, and its tokens as the length check counts them (generated tokens not included)."""

    prompt: str
    outputs: list[str]
    tokens: int


def search_size(tokens_at: Callable[[int], int], lower: int, upper: int, budget: int) -> int:
    """Largest tried size whose freshly drawn sample has at most `budget` tokens, or `lower` if none has."""
    best = lower
    while lower <= upper:
        middle = (lower + upper) // 2
        if tokens_at(middle) <= budget:
            best = middle
            lower = middle + 1
        else:
            upper = middle - 1
    return best


def draw_fitting(draw: Callable[[int], Drawn], size: int, step: int, budget: int) -> Drawn:
    """Draw at `size`, then `step` smaller after each miss; at or below `step`, redraw at the same size.

    Raises:
        NotApplicableError: no sample fitted.
    """
    redraws = 0
    shortest = None
    while redraws <= MAX_REDRAWS:
        try:
            drawn = draw(size)
        except MissedDrawError:
            drawn = None
        if drawn is not None and drawn.tokens <= budget:
            return drawn
        if size > step:
            size -= step
            continue
        redraws += 1
        if drawn is not None:
            shortest = min(drawn.tokens, shortest or drawn.tokens)
    if shortest is None:
        raise NotApplicableError(f"too short: {redraws} draws of the smallest prompt gave no sample")
    raise NotApplicableError(
        f"too short: with this tokenizer the smallest prompt takes {shortest} tokens, {budget} are left for it"
    )
