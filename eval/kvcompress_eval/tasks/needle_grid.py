"""Needle grid: one random number at a fixed depth of a filled context, for a heat map of length against depth.

The haystack and the question are RULER's niah_single_1. The score is an exact match: the first number of the answer is
the hidden one, so that nothing can be guessed and no half-right answer counts.
"""

from __future__ import annotations

import re
from random import Random

from kvcompress_eval.tasks.fitting import draw_fitting, most_that_fits
from kvcompress_eval.tasks.questions import Ask, Question, Questions, prompt_tokens
from kvcompress_eval.tasks.ruler.niah import random_word, singular
from kvcompress_eval.tasks.ruler.strings import strings

DEPTHS = tuple(range(0, 101, 10))
"""Percent of the context before the needle."""
MAX_TOKENS = 32


def make(ask: Ask) -> Questions:
    """Questions that fill the room; the depths take turns, so that every eleven samples cover all of them.

    Raises:
        NotApplicableError: the room is too small.
    """
    assert ask.room is not None, "generated tasks are given a length"
    room = ask.room - MAX_TOKENS

    def tokens(drawn: tuple[str, str, str]) -> list[int]:
        return prompt_tokens(ask.tokenizer, drawn[0], chat=ask.chat, answer_prefix=drawn[1])

    size = most_that_fits(lambda lines: len(tokens(draw(Random(ask.seed), lines, 0))), room)
    items = []
    for index in range(ask.samples):
        depth = DEPTHS[index % len(DEPTHS)]
        prompt, drawn = draw_fitting(
            lambda random, lines, depth=depth: draw(random, lines, depth),  # type: ignore[misc]
            f"{ask.seed} needle_grid {ask.room} {index}",
            size,
            tokens,
            room,
        )
        items.append(Question(prompt, (drawn[2],), {"depth": depth}))
    return Questions(items, MAX_TOKENS, exact_match)


def draw(random: Random, lines: int, depth: int) -> tuple[str, str, str]:
    """Question, the words that begin the answer, and the number, hidden after `depth` percent of the lines."""
    text = strings("niah")
    key, value = random_word(random, "words"), random_word(random, "numbers")
    haystack = [text.noise] * lines
    haystack.insert(round(lines * depth / 100), text.needle.format(type_needle_v="numbers", key=key, value=value))
    filled = {"type_needle_v": "number", "context": "\n".join(haystack), "query": key}
    return singular(text.template).format(**filled), singular(text.answer_prefix).format(**filled), value


def exact_match(answer: str, question: Question) -> float:
    """1 where the first number of the answer is the reference."""
    found = re.search(r"\d+", answer)
    return float(found is not None and found[0] == question.references[0])
