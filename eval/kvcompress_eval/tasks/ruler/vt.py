"""RULER's variable tracking: find every variable that a chain of assignments in noise gives one value.

Specification: NVIDIA/RULER v1. Names come from the `random` stream, values from numpy's, both seeded once; an example
in the prompt is built first and gets new names and a new value for every sample.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import numpy as np

from kvcompress_eval.tasks.ruler.sample import NotApplicableError, Request, Sample, split_sample
from kvcompress_eval.tasks.ruler.sizing import Drawn, MissedDrawError, draw_fitting, search_size
from kvcompress_eval.tasks.ruler.strings import strings
from kvcompress_eval.tasks.ruler.task import Task

EXAMPLE_LENGTH = 500
EXAMPLE_VALUE = "12345"


@dataclass(frozen=True)
class Vt(Task):
    """Parameters of a vt task: number of chains and assignments per chain after the first."""

    chains: int = 1
    hops: int = 4

    family = "vt"

    def generate(self, request: Request) -> Iterator[Sample]:
        text = strings("vt")
        streams = Streams(Random(request.seed), np.random.RandomState(request.seed))
        example = self._example(streams, request)
        example_tokens = request.count(example)
        budget = request.length - self.tokens_to_generate
        step = 5 if request.length < 4096 else 10
        template = request.prompt_template("vt")

        def draw(size: int) -> Drawn:
            prompt, outputs = self._draw(streams, template, size)
            cut = prompt.index(text.template[:20])
            prompt = prompt[:cut] + self._renamed(streams, example) + "\n" + prompt[cut:]
            return Drawn(prompt, outputs, request.count(prompt))

        # The search draws no example: it counts the one that was built.
        size = self._search(streams, template, request, step, budget - example_tokens)
        for index in range(request.samples):
            drawn = draw_fitting(draw, size, step, budget)
            length = drawn.tokens + self.tokens_to_generate
            yield split_sample(index, drawn.prompt, drawn.outputs, text.answer_prefix, length)

    def _example(self, streams: Streams, request: Request) -> str:
        """A solved prompt of at most 500 tokens, answers included in the text, as a base model would be shown it."""
        template = strings("vt").prompt
        short = Vt(self.chains, min(10, self.hops))
        example_request = Request(EXAMPLE_LENGTH, 1, request.seed, request.count)

        def draw(size: int) -> Drawn:
            prompt, outputs = short._draw(streams, template, size, is_example=True)
            return Drawn(prompt, outputs, request.count(prompt))

        size = short._search(streams, template, example_request, 5, EXAMPLE_LENGTH, is_example=True)
        drawn = draw_fitting(draw, size, 5, EXAMPLE_LENGTH)
        return drawn.prompt + " " + " ".join(drawn.outputs) + "\n"

    def _search(
        self, streams: Streams, template: str, request: Request, step: int, budget: int, *, is_example: bool = False
    ) -> int:
        def tokens_at(size: int) -> int:
            while True:
                try:
                    return request.count(self._draw(streams, template, size, is_example=is_example)[0])
                except MissedDrawError:  # ends the benchmark's script; there are no bytes to be the same as
                    continue

        upper = max(int(request.length / (tokens_at(step) / step) * 3), 2 * step)
        return search_size(tokens_at, step, upper, budget)

    def _draw(self, streams: Streams, template: str, size: int, *, is_example: bool = False) -> tuple[str, list[str]]:
        """One prompt over `size` noise lines, and the names of its first chain.

        Raises:
            MissedDrawError: a name was drawn twice. The names that replace it make a chain of their own, which is too
                short; it takes a value from the stream like the others.
        """
        names_per_chain = self.hops + 1
        wanted = self.chains * names_per_chain
        letters = 3 if is_example else 5
        names = [streams.name(letters) for _ in range(wanted)]
        while len(set(names)) < wanted:
            names.append(streams.name(letters))
        chains = [names[start : start + names_per_chain] for start in range(0, len(names), names_per_chain)]
        values = [EXAMPLE_VALUE if is_example else streams.value() for _ in chains]
        if len(chains[-1]) < names_per_chain:
            raise MissedDrawError("a name was drawn twice")
        if size < names_per_chain:
            raise NotApplicableError(f"too short: {names_per_chain} assignments need as many lines, {size} fit")
        lines = [strings("niah").noise] * size
        for chain, value in zip(chains, values, strict=True):
            assignments = [f"VAR {chain[0]} = {value}"]
            assignments += [f"VAR {new} = VAR {old} " for old, new in pairwise(chain)]
            positions = sorted(streams.random.sample(range(len(lines)), len(assignments)))
            for shift, (position, assignment) in enumerate(zip(positions, assignments, strict=True)):
                lines.insert(position + shift, assignment)
        context = "\n".join(lines).replace(". \n", ".\n")
        prompt = template.format(context=context, query=values[0], num_v=names_per_chain)
        return prompt, chains[0]

    def _renamed(self, streams: Streams, example: str) -> str:
        """The example with new names of the same length, then a new value."""
        for name in example.split()[-self.hops - 1 :]:
            example = example.replace(name, streams.name(len(name)))
        return example.replace(EXAMPLE_VALUE, streams.value())


@dataclass(frozen=True)
class Streams:
    """The two random streams of one generation."""

    random: Random
    numpy: np.random.RandomState

    def name(self, letters: int) -> str:
        return "".join(self.random.choices(string.ascii_uppercase, k=letters))

    def value(self) -> str:
        return str(self.numpy.randint(10000, 99999))
