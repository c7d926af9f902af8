"""The literal strings of the benchmark, read from strings.yaml, their single source."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml


@dataclass(frozen=True)
class TaskStrings:
    """Prompt template, answer prefix and generation length of one task family; `needle` and `noise` are niah's."""

    template: str
    answer_prefix: str
    tokens_to_generate: int
    needle: str = ""
    noise: str = ""

    @property
    def prompt(self) -> str:
        """The template followed by the answer prefix: all that a base model is shown."""
        return self.template + self.answer_prefix


def strings_text() -> str:
    """The raw text of strings.yaml, part of every cache key."""
    return (files(__package__) / "strings.yaml").read_text("utf-8")


@cache
def strings(family: str) -> TaskStrings:
    """Strings of one family: niah, vt, cwe or fwe."""
    return TaskStrings(**yaml.safe_load(strings_text())[family])
