"""What stands around a task's template: nothing for base models, a user's turn for chat models.

Names and texts are the benchmark's, except `chat`, which takes the tokenizer's own chat template.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvcompress_eval.tasks.ruler.strings import model_templates

SLOT = "{task_template}"
CHAT = "chat"


@dataclass(frozen=True)
class ModelTemplate:
    """Text before and after a task's template. The answer prefix follows both, where the assistant begins to speak."""

    name: str = "base"
    before: str = ""
    after: str = ""

    def wrap(self, task_template: str) -> str:
        """The whole as a format string; braces of the surrounding text stand for themselves."""
        before, after = (text.replace("{", "{{").replace("}", "}}") for text in (self.before, self.after))
        return before + task_template + after


BASE = ModelTemplate()


def model_template(name: str, chat_turn: Callable[[], tuple[str, str]]) -> ModelTemplate:
    """The template of that name.

    Args:
        chat_turn: called for `chat`; gives what the tokenizer's chat template puts before and after a user's message.

    Raises:
        ValueError: no such template, or the tokenizer has none of its own.
    """
    if name == CHAT:
        return ModelTemplate(name, *chat_turn())
    known = model_templates()
    if name not in known:
        raise ValueError(f"unknown prompt template {name!r}; known: {', '.join([*known, CHAT])}")
    before, after = known[name].split(SLOT)
    return ModelTemplate(name, before, after)
