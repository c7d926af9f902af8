"""The benchmark's prompts, read from prompts.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml


@dataclass(frozen=True)
class Template:
    """Prompt, the words that begin the answer, and the tokens it may take; `needle` is the hidden line."""

    max_tokens: int
    prompt: str
    answer_prefix: str
    needle: str = ""


@cache
def template(task: str) -> Template:
    """The template of one task, by the benchmark's name."""
    entries = yaml.safe_load((files(__package__) / "prompts.yaml").read_text("utf-8"))
    return Template(**entries[task])
