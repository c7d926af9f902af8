"""Benchmark prompts as text, in the published procedure's order of random draws, for scoring the model.

This is apart from tasks.py on purpose: training builds prompts from token pieces, scoring from whole texts, so a
mistake in one does not hide in the other.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
from strings import benchmark_strings
from words import random_key, random_number, random_uuid

Count = Callable[[str], int]
DRAW = {"words": random_key, "numbers": random_number, "uuids": random_uuid}


@dataclass(frozen=True)
class Sample:
    """A prompt and the strings that a right answer contains."""

    prompt: str
    references: list[str]


@dataclass(frozen=True)
class NiahTask:
    """Arguments of one needle task."""

    haystack: str = "noise"
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    generate: int = 128

    def draw(self, rng: random.Random, size: int) -> Sample:
        """A sample with a haystack of `size` lines."""
        part = benchmark_strings()["niah"]
        kind = self.value_kind
        draw_key, draw_value = partial(DRAW[self.key_kind], rng), partial(DRAW[kind], rng)
        needle = part["needle"]
        names, found, needles = [], [], []
        for _ in range(max(self.keys, self.queries)):
            names.append(draw_key())
            found.append([draw_value() for _ in range(self.values)])
            needles += [needle.format(type_needle_v=kind, key=names[-1], value=v) for v in found[-1]]
        random.Random(42).shuffle(needles)
        if self.haystack == "noise":
            lines = [part["noise"]] * size
        else:
            lines = [needle.format(type_needle_v=kind, key=draw_key(), value=draw_value()) for _ in range(size)]
        for place, text in zip(sorted(rng.sample(range(size), len(needles)), reverse=True), needles, strict=True):
            lines.insert(place, text)
        chosen = rng.sample(range(len(names)), self.queries)
        asked = [names[i] for i in chosen]
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        template = part["template"] + part["answer_prefix"]
        if self.queries * self.values == 1:
            for old, new in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
                template = template.replace(old, new)
            kind = kind[:-1]
        text = template.format(type_needle_v=kind, context="\n".join(lines), query=query)
        return Sample(text, [v for i in chosen for v in found[i]])


@dataclass(frozen=True)
class VtTask:
    """Variable tracking of one chain."""

    hops: int = 4
    example_size: int = 5
    generate: int = 30

    def block(self, rng: random.Random, size: int, letters: int, value: str) -> tuple[str, list[str]]:
        """The prompt proper, and the chain's names."""
        part = benchmark_strings()["vt"]
        names: list[str] = []
        while len(names) < self.hops + 1:
            name = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=letters))
            names += [] if name in names else [name]
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {b} = VAR {a} " for a, b in pairwise(names)]
        lines = [benchmark_strings()["niah"]["noise"]] * size
        for j, place in enumerate(sorted(rng.sample(range(size), len(chain)))):
            lines.insert(place + j, chain[j])
        context = "\n".join(lines).replace(". \n", ".\n")
        text = part["template"].format(context=context, query=value)
        return text + part["answer_prefix"].format(num_v=self.hops + 1, query=value), names

    def draw(self, rng: random.Random, size: int) -> Sample:
        """The worked example, then the question."""
        numbers = np.random.RandomState(rng.randrange(2**31))
        shown, shown_names = self.block(rng, self.example_size, 3, str(numbers.randint(10000, 99999)))
        text, names = self.block(rng, size, 5, str(numbers.randint(10000, 99999)))
        return Sample(f"{shown} {' '.join(shown_names)}\n\n{text}", names)


def fitting_size(task: NiahTask | VtTask, rng: random.Random, length: int, count: Count, step: int = 5) -> int:
    """The benchmark's search for the largest haystack whose prompt and answer fit into `length` tokens."""
    per_line = count(task.draw(rng, step).prompt) / step
    low, high, best = step, max(int(length / per_line * 3), 2 * step), 0
    while low <= high:
        middle = (low + high) // 2
        if count(task.draw(rng, middle).prompt) + task.generate <= length:
            low, best = middle + 1, middle
        else:
            high = middle - 1
    return best or step


def samples(task: NiahTask | VtTask, length: int, number: int, count: Count, seed: int = 42) -> list[Sample]:
    """`number` samples that fit, each starting from the size that the search found."""
    rng = random.Random(seed)
    if isinstance(task, VtTask):
        # The worked example is the largest within 500 tokens.
        blocks = {n: task.block(random.Random(seed), n, 3, "12345")[0] for n in range(5, 60)}
        task = replace(task, example_size=max((n for n, text in blocks.items() if count(text) <= 500), default=5))
    size = fitting_size(task, rng, length, count)
    drawn = []
    for _ in range(number):
        used = size
        while count((sample := task.draw(rng, used)).prompt) + task.generate > length and used > 5:
            used -= 5
        drawn.append(sample)
    return drawn
