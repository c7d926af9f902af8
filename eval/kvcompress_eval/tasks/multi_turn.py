"""Multi-turn reuse: a second question on a context that the cache already holds.

The second prompt is the first one, the right answer to it, and another question, token for token: an engine with prefix
caching finds the context stored and compressed, and reads the new part against it. The right answer stands there
whatever the model said, so that all models and engines see the same prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from kvcompress_eval.tasks.fitting import draw_fitting, most_that_fits
from kvcompress_eval.tasks.needle_grid import exact_match
from kvcompress_eval.tasks.questions import Ask, FollowUp, Question, Questions, prompt_tokens
from kvcompress_eval.tasks.ruler.niah import random_word, singular
from kvcompress_eval.tasks.ruler.strings import strings

MAX_TOKENS = 32
KEYS = 4


@dataclass(frozen=True)
class Drawn:
    """A context with the first question, the second question, the words that begin each answer, and the answers."""

    first: str
    second: str
    prefixes: tuple[str, str]
    answers: tuple[str, str]


def draw(random: Random, lines: int) -> Drawn:
    """Four numbers in lines of noise, two of which are asked for."""
    text = strings("niah")
    keys: list[str] = []
    while len(keys) < KEYS:
        key = random_word(random, "words")
        keys += [] if key in keys else [key]
    values = [random_word(random, "numbers") for _ in keys]
    haystack = [text.noise] * lines
    for key, value in zip(keys, values, strict=True):
        needle = text.needle.format(type_needle_v="numbers", key=key, value=value)
        haystack.insert(random.randint(0, len(haystack)), needle)
    template, prefix = singular(text.template), singular(text.answer_prefix)
    asked = template[template.index("{context}") + len("{context}\n") :]
    one, other = ({"type_needle_v": "number", "query": key} for key in keys[:2])
    return Drawn(
        template.format(context="\n".join(haystack), **one),
        asked.format(**other),
        (prefix.format(**one), prefix.format(**other)),
        (values[0], values[1]),
    )


def make(ask: Ask) -> Questions:
    """Conversations whose second prompt fills the room.

    Raises:
        NotApplicableError: the room is too small.
    """
    assert ask.room is not None, "generated tasks are given a length"
    room = ask.room - MAX_TOKENS
    size = most_that_fits(lambda lines: len(both_prompts(ask, draw(Random(ask.seed), lines))[1]), room)
    items, seconds = [], {}
    for index in range(ask.samples):
        seed = f"{ask.seed} multi_turn {ask.room} {index}"
        _, drawn = draw_fitting(draw, seed, size, lambda drawn: both_prompts(ask, drawn)[1], room)
        first, second = both_prompts(ask, drawn)
        shared = next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
        items.append(Question(first, (drawn.answers[0],), {"index": index}))
        seconds[index] = Question(second, (drawn.answers[1],), {"shared_tokens": shared})
    longest = max(len(question.prompt) for question in seconds.values())
    follow_up = FollowUp(lambda first, _: seconds[first.details["index"]], MAX_TOKENS, longest, first_counts=True)
    return Questions(items, MAX_TOKENS, exact_match, follow_up)


def both_prompts(ask: Ask, drawn: Drawn) -> tuple[list[int], list[int]]:
    """Tokens of the first prompt, and of the second, which begins with the first unless a chat template forbids it."""
    first = prompt_tokens(ask.tokenizer, drawn.first, chat=ask.chat, answer_prefix=drawn.prefixes[0])
    answer = f" {drawn.answers[0]}."
    if not ask.chat:
        return first, first + ask.tokenizer.encode(f"{answer}\n{drawn.second}{drawn.prefixes[1]}", special=False)
    asked = ask.tokenizer.chat(
        [
            {"role": "user", "content": drawn.first},
            {"role": "assistant", "content": drawn.prefixes[0].lstrip() + answer},
            {"role": "user", "content": drawn.second},
        ]
    )
    return first, ask.tokenizer.encode(asked + drawn.prefixes[1].lstrip(), special=False)
