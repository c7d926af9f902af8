"""InfiniteBench's generated tasks, at any length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from kvcompress_eval.tasks.fitting import draw_fitting, most_that_fits
from kvcompress_eval.tasks.infinitebench import drawing, scoring
from kvcompress_eval.tasks.infinitebench.drawing import Drawn
from kvcompress_eval.tasks.infinitebench.templates import template
from kvcompress_eval.tasks.questions import Ask, Question, Questions, Score, prompt_tokens


@dataclass(frozen=True)
class Generated:
    """How one task is drawn, from a random stream and a size, and judged."""

    draw: Callable[[Random, int], Drawn]
    score: Score


GENERATED: dict[str, Generated] = {
    "passkey": Generated(drawing.passkey, scoring.first_integer),
    "number_string": Generated(drawing.number_string, scoring.first_integer),
    "kv_retrieval": Generated(drawing.kv_retrieval, scoring.whole_word),
    "math_find": Generated(drawing.math_find, scoring.first_number),
    "code_run": Generated(drawing.code_run, scoring.last_word),
}


def make(name: str, ask: Ask) -> Questions:
    """Questions of one task that fill the room. A sample does not depend on how many follow it.

    Raises:
        NotApplicableError: the room is too small.
    """
    task, max_tokens = GENERATED[name], template(name).max_tokens
    assert ask.room is not None, "generated tasks are given a length"
    room = ask.room - max_tokens

    def tokens(drawn: Drawn) -> list[int]:
        return prompt_tokens(ask.tokenizer, drawn.prompt, chat=ask.chat, answer_prefix=drawn.answer_prefix)

    size = most_that_fits(lambda n: len(tokens(task.draw(Random(f"{ask.seed} {name}"), n))), room)
    items = []
    for index in range(ask.samples):
        prompt, drawn = draw_fitting(task.draw, f"{ask.seed} {name} {ask.room} {index}", size, tokens, room)
        details = {} if drawn.depth is None else {"depth": 10 * round(drawn.depth / 10)}
        items.append(Question(prompt, (drawn.answer,), details))
    return Questions(items, max_tokens, task.score)
