"""What a RULER generator is asked for, what it returns, and how it says that it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvcompress_eval.tasks.ruler.sources import NO_FILES, Sources
from kvcompress_eval.tasks.ruler.strings import strings
from kvcompress_eval.tasks.ruler.templates import BASE, ModelTemplate

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
    template: ModelTemplate = BASE
    sources: Sources = NO_FILES

    def prompt_template(self, family: str) -> str:
        """What a prompt of the family is formatted from: the wrapped task template, then the answer prefix."""
        text = strings(family)
        return self.template.wrap(text.template) + text.answer_prefix


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
