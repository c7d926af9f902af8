"""What an engine does for the suite: continue prompts greedily, and score given tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Generation:
    """A greedy continuation; the token that ended it is not part of it."""

    tokens: tuple[int, ...]
    text: str
    cached_tokens: int | None = field(default=None, compare=False)
    """Tokens of the prompt that were found in the prefix cache, where the engine says so."""


@dataclass(frozen=True)
class Scores:
    """Teacher-forced scores of a sequence of T tokens. Entry t is about token t + 1, given tokens 0 to t."""

    log_probs_T: NDArray[np.float32]
    """Natural log probability of the token that follows, [T - 1]."""
    top1_T: NDArray[np.int64]
    """Most probable token, [T - 1]."""
    distribution_TV: NDArray[np.float32] | None = None
    """Log probabilities of the whole vocabulary, [T - 1, V] or the rows asked for, where the engine has them."""


class Engine(Protocol):
    """One model, ready to run. Prompts are token ids, so that every model and engine sees the same ones."""

    @property
    def name(self) -> str:
        """transformers, vllm or openai."""

    @property
    def batch_size(self) -> int:
        """Prompts worth handing over in one call."""

    @property
    def vocabulary(self) -> int | None:
        """Size of the whole distributions that `score` can return; None where it cannot."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        until: Sequence[Sequence[str]] | None = None,
        *,
        ignore_end: bool = False,
        answered: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        """Greedy continuations of at most `max_tokens` tokens, ended by the model's end-of-sequence token.

        Args:
            until: per prompt, texts after all of which (case ignored) a continuation may end early. A score that
                counts references found cannot change from there on.
            ignore_end: continue past the end-of-sequence token, which is then part of the continuation.
            answered: called with the number of continuations that are finished, as each of them is.
        """

    def score(self, tokens: Sequence[int], *, distribution: bool = False, rows: Sequence[int] | None = None) -> Scores:
        """Score one sequence. A compressed model attends every token in its stored form.

        Args:
            rows: the entries, in rising order, of which the distribution is wanted; all by default. A long sequence's
                distributions would not fit in memory.
        """

    def capacity_tokens(self) -> int | None:
        """Tokens that the engine says its KV cache holds, or None where it has no fixed cache."""

    def close(self) -> None:
        """Give back memory."""


def contains_all(text: str, wanted: Sequence[str]) -> bool:
    """Whether every wanted text occurs, case ignored."""
    lowered = text.lower()
    return all(item.lower() in lowered for item in wanted)
