"""An engine without a model: a fixed rule says which token follows, and how likely."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from kvcompress_eval.engines import Generation, Scores


class FakeEngine:
    """Predicts token + `step` (modulo `size`) with probability `certainty`, the rest evenly; `blind` without
    distributions."""

    name = "fake"
    batch_size = 2

    def __init__(self, size: int = 16, step: int = 1, certainty: float = 0.9, *, blind: bool = False) -> None:
        self.size, self.step, self.certainty = size, step, certainty
        self.vocabulary = None if blind else size
        self.scored: list[tuple[int, ...]] = []
        self.continued: list[tuple[int, ...]] = []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        until: Sequence[Sequence[str]] | None = None,
        *,
        ignore_end: bool = False,
        answered: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        self.continued += [tuple(prompt) for prompt in prompts]
        made = [
            tuple((prompt[-1] + self.step * (at + 1)) % self.size for at in range(max_tokens)) for prompt in prompts
        ]
        return [Generation(tokens, " ".join(map(str, tokens))) for tokens in made]

    def score(self, tokens: Sequence[int], *, distribution: bool = False, rows: Sequence[int] | None = None) -> Scores:
        self.scored.append(tuple(tokens))
        sequence = np.asarray(tokens)
        rest = (1 - self.certainty) / (self.size - 1)
        top1 = (sequence[:-1] + self.step) % self.size
        whole = np.full((len(top1), self.size), rest)
        whole[np.arange(len(top1)), top1] = self.certainty
        log_probs = np.log(whole[np.arange(len(top1)), sequence[1:]]).astype(np.float32)
        picked = whole if rows is None else whole[list(rows)]
        return Scores(log_probs, top1, np.log(picked).astype(np.float32) if distribution else None)

    def capacity_tokens(self) -> int | None:
        return 4096

    def close(self) -> None:
        """Nothing is held."""
