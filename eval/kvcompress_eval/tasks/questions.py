"""What a task asks, beside RULER's: prompts as tokens, and how an answer is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvcompress_eval.tasks.data_files import DataSource
from kvcompress_eval.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Ask:
    """One task as it is wanted.

    `room` is the most tokens that prompt and answer may take together, None where nothing bounds them. Generated tasks
    fill it; tasks from files cut what is longer.
    """

    room: int | None
    samples: int
    seed: int
    tokenizer: TextTokenizer
    data: DataSource
    chat: bool
    """Put the question into the model's chat template, unless the benchmark says otherwise."""


@dataclass(frozen=True)
class Question:
    """One prompt and the answers it may have."""

    prompt: list[int]
    references: tuple[str, ...]
    details: dict[str, Any] = field(default_factory=dict)
    """Facts that the sample's row keeps: depth of the needle, whether the prompt was cut."""
    classes: tuple[str, ...] = ()
    """All that a classification may answer."""


def prompt_tokens(tokenizer: TextTokenizer, text: str, *, chat: bool, answer_prefix: str = "") -> list[int]:
    """Tokens of one question, with the words that begin the answer behind it.

    A base model reads on where the text ends; a chat model finds the text in its template, and the answer begun.
    """
    if not chat:
        return tokenizer.encode(text + answer_prefix)
    # The template writes the token that begins a sequence itself.
    asked = tokenizer.chat([{"role": "user", "content": text}])
    return tokenizer.encode(asked + answer_prefix.lstrip(), special=False)


Score = Callable[[str, Question], float]
"""Score of an answer, 0 to 1."""


@dataclass(frozen=True)
class FollowUp:
    """A second question, asked once the first was answered."""

    ask: Callable[[Question, str], Question]
    """The second question, from the first and its answer."""
    max_tokens: int
    longest: int
    """Most tokens that a second prompt can have."""
    first_counts: bool
    """Whether the score is the mean of both answers, or the second's alone."""


@dataclass(frozen=True)
class Questions:
    """A task at one length."""

    items: list[Question]
    max_tokens: int
    score: Score
    follow_up: FollowUp | None = None
    split_by: tuple[str, ...] = ()
    """Details by which results are broken down as well."""

    @property
    def needs(self) -> int:
        """Tokens of the longest prompt with its answer."""
        first = max(len(item.prompt) for item in self.items) + self.max_tokens
        return first if self.follow_up is None else max(first, self.follow_up.longest + self.follow_up.max_tokens)
