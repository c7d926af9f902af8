"""RULER's needle in a haystack: one file for every variant and haystack.

Specification: NVIDIA/RULER v1. `random` stands for the benchmark's one global stream; shuffles use a generator of their
own, seeded alike for every sample.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

from kvcompress_eval.tasks.ruler.essay import Essay, essay, generated_essay
from kvcompress_eval.tasks.ruler.sample import NotApplicableError, Request, Sample, split_sample
from kvcompress_eval.tasks.ruler.sizing import Drawn, draw_fitting, search_size
from kvcompress_eval.tasks.ruler.strings import strings
from kvcompress_eval.tasks.ruler.task import Task
from kvcompress_eval.tasks.ruler.words import word_keys

ValueKind = Literal["numbers", "words", "uuids"]
Haystack = Literal["noise", "needle", "essay", "prose"]
"""`prose` is `essay` with a generated text in place of the benchmark's."""


@dataclass(frozen=True)
class Niah(Task):
    """Parameters of a niah task. `keys` is raised to at least `queries`."""

    haystack: Haystack
    key_kind: ValueKind = "words"
    value_kind: ValueKind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    family = "niah"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("essay",) if self.haystack == "essay" else ()

    def generate(self, request: Request) -> Iterator[Sample]:
        random = Random(request.seed)
        budget = request.length - self.tokens_to_generate
        text = self._essay(request)
        step = 500 if text else 5 if request.length < 4096 else 25

        def draw(size: int) -> Drawn:
            prompt, outputs = self._draw(random, request, text, size)
            return Drawn(prompt, outputs, request.count(prompt))

        tokens_per_unit = draw(step).tokens / step
        upper = max(int(request.length / tokens_per_unit * 3), 2 * step)
        size = search_size(lambda n: draw(n).tokens, step, upper, budget)
        for index in range(request.samples):
            drawn = draw_fitting(draw, size, step, budget)
            length = drawn.tokens + self.tokens_to_generate
            yield split_sample(index, drawn.prompt, drawn.outputs, strings("niah").answer_prefix, length)

    def _essay(self, request: Request) -> Essay | None:
        if self.haystack == "prose":
            return generated_essay()
        return essay(request.sources.path("essay")) if self.haystack == "essay" else None

    def _draw(self, random: Random, request: Request, text: Essay | None, size: int) -> tuple[str, list[str]]:
        """One prompt over `size` words of an essay, or as many lines, and its answers."""
        keys: list[str] = []
        values: list[list[str]] = []
        needles: list[str] = []
        for _ in range(max(self.keys, self.queries)):
            keys.append(random_word(random, self.key_kind))
            values.append([])
            for _ in range(self.values):
                values[-1].append(random_word(random, self.value_kind))
                needles.append(self._needle(keys[-1], values[-1][-1]))
        Random(request.seed).shuffle(needles)
        context = text.with_needles(random, size, needles) if text else self._lines(random, size, needles)

        asked = random.sample(range(len(keys)), self.queries)
        outputs = [value for index in asked for value in values[index]]
        template, kind = request.prompt_template("niah"), str(self.value_kind)
        if len(outputs) == 1:
            template, kind = singular(template), kind[:-1]
        query = enumeration([keys[index] for index in asked])
        return template.format(type_needle_v=kind, context=context, query=query), outputs

    def _lines(self, random: Random, size: int, needles: list[str]) -> str:
        """`size` lines of noise or of other needles, with the needles at random places among them."""
        if size < len(needles):
            raise NotApplicableError(f"too short: {len(needles)} needles need as many lines, {size} fit")
        if self.haystack == "noise":
            lines = [strings("niah").noise] * size
        else:
            lines = [
                self._needle(random_word(random, self.key_kind), random_word(random, self.value_kind))
                for _ in range(size)
            ]
        positions = sorted(random.sample(range(size), len(needles)), reverse=True)
        for position, needle in zip(positions, needles, strict=True):
            lines.insert(position, needle)
        return "\n".join(lines)

    def _needle(self, key: str, value: str) -> str:
        return strings("niah").needle.format(type_needle_v=self.value_kind, key=key, value=value)


def random_word(random: Random, kind: ValueKind) -> str:
    """A key or a value: a number of seven digits, an adjective-noun pair or a version 4 uuid."""
    if kind == "numbers":
        return str(random.randint(10**6, 10**7 - 1))
    if kind == "words":
        return random.choice(word_keys())
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


def singular(template: str) -> str:
    """The template for one asked value."""
    for plural, one in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        template = template.replace(plural, one)
    return template


def enumeration(names: list[str]) -> str:
    """`a`; `a, and b`; `a, b, and c`."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + ", and " + names[-1]
