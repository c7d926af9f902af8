"""The literal strings of the benchmark, read from strings.yaml, their single source."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml


@dataclass(frozen=True)
class TaskStrings:
    """Prompt template, answer prefix and generation length of one family.

    `needle` and `noise` are niah's, `document` is qa's.
    """

    template: str
    answer_prefix: str
    tokens_to_generate: int
    needle: str = ""
    noise: str = ""
    document: str = ""

    @property
    def prompt(self) -> str:
        """The template followed by the answer prefix: all that a base model is shown."""
        return self.template + self.answer_prefix


def strings_text() -> str:
    """The raw text of strings.yaml, part of every cache key."""
    return (files(__package__) / "strings.yaml").read_text("utf-8")


@cache
def _sections() -> dict[str, Any]:
    sections: dict[str, Any] = yaml.safe_load(strings_text())
    return sections


@cache
def strings(family: str) -> TaskStrings:
    """Strings of one family: niah, vt, cwe, fwe or qa."""
    return TaskStrings(**_sections()[family])


def model_templates() -> dict[str, str]:
    """By name: the text around a task's template, which stands in it as `{task_template}`."""
    templates: dict[str, str] = _sections()["model_templates"]
    return templates
