"""How long is left, from what every row has taken per token so far."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable


class Clock:
    """Knows seconds per token of the rows that ran; of others it expects the mean."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._tokens: dict[str, int] = defaultdict(int)

    def add(self, row: str, tokens: int, seconds: float) -> None:
        self._seconds[row] += seconds
        self._tokens[row] += tokens

    def left(self, to_do: Iterable[tuple[str, int]]) -> float:
        """Seconds for rows and numbers of tokens that are still to run; 0 before anything ran."""
        done = sum(self._tokens.values())
        mean = sum(self._seconds.values()) / done if done else 0.0
        rates = {row: self._seconds[row] / self._tokens[row] for row in self._tokens}
        return sum(tokens * rates.get(row, mean) for row, tokens in to_do)


def spoken(seconds: float) -> str:
    """A duration in words: `40 s`, `12 min`."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
