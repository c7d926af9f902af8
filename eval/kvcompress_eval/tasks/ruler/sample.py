"""What a RULER generator is asked for, what it returns, and how it says that it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Count = Callable[[str], int]
"""Tokens of a text, no special tokens."""


class NotApplicableError(ValueError):
    """The task cannot be made at this length with this tokenizer."""


@dataclass(frozen=True)
class Request:
    """One set of samples: `length` in tokens includes the generated ones."""

    length: int
    samples: int
    seed: int
    count: Count


@dataclass(frozen=True)
class Sample:
    """One sample. The model sees `input + answer_prefix`; `length` counts that and the generated tokens."""

    index: int
    input: str
    outputs: tuple[str, ...]
    answer_prefix: str
    length: int

    @property
    def prompt(self) -> str:
        return self.input + self.answer_prefix


def split_sample(index: int, prompt: str, outputs: list[str], raw_prefix: str, length: int) -> Sample:
    """Cut the prompt where the last occurrence of the first 10 characters of the raw answer prefix begins."""
    cut = prompt.rindex(raw_prefix[:10])
    return Sample(index, prompt[:cut], tuple(outputs), prompt[cut:], length)
