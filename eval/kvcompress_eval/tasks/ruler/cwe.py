"""RULER's common words extraction: name the ten words that a numbered list repeats most.

Specification: NVIDIA/RULER v1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from kvcompress_eval.tasks.ruler.sample import NotApplicableError, Request, Sample, split_sample
from kvcompress_eval.tasks.ruler.sizing import Drawn, draw_fitting, search_size
from kvcompress_eval.tasks.ruler.sources import more_words
from kvcompress_eval.tasks.ruler.strings import strings
from kvcompress_eval.tasks.ruler.task import Task
from kvcompress_eval.tasks.ruler.words import word_pool

STEP = 10
SIZING_WORDS = 4096


@dataclass(frozen=True)
class Cwe(Task):
    """Parameters of cwe: how often common and rare words stand in the list from 4,096 tokens on (6 and 1 below)."""

    common_repeats: int = 30
    rare_repeats: int = 3
    common_words: int = 10

    family = "cwe"

    @property
    def uses(self) -> tuple[str, ...]:
        return ("words",)

    def generate(self, request: Request) -> Iterator[Sample]:
        random = Random(request.seed)
        pool = list(word_pool())
        Random(request.seed).shuffle(pool)
        words = Words(pool, more_words(request.sources.words) if request.sources.words else ())
        budget = request.length - self.tokens_to_generate

        def draw(size: int) -> Drawn:
            prompt, outputs = self._draw(random, words, request, size)
            return Drawn(prompt, outputs, request.count(prompt))

        tokens_per_word = draw(SIZING_WORDS).tokens / SIZING_WORDS
        upper = max(int(request.length // tokens_per_word) * 2, 2 * STEP)
        size = search_size(lambda n: draw(n).tokens, STEP, upper, budget)
        for index in range(request.samples):
            drawn = draw_fitting(draw, size, STEP, budget)
            length = drawn.tokens + self.tokens_to_generate
            yield split_sample(index, drawn.prompt, drawn.outputs, strings("cwe").answer_prefix, length)

    def _draw(self, random: Random, words: Words, request: Request, size: int) -> tuple[str, list[str]]:
        """An example with its answers, then the list of `size` different words to solve."""
        if request.length < 4096:
            example_words, example_repeats, repeats = 20, (3, 1), (6, 1)
        else:
            example_words, example_repeats, repeats = 40, (10, 3), (self.common_repeats, self.rare_repeats)
        template = request.prompt_template("cwe")
        example, example_outputs = self._list(random, words, request.seed, example_words, example_repeats)
        context, outputs = self._list(random, words, request.seed, size, repeats)
        solved = template.format(context=example) + " " + numbered(example_outputs)
        return solved + "\n" + template.format(context=context), outputs

    def _list(
        self, random: Random, words: Words, seed: int, size: int, repeats: tuple[int, int]
    ) -> tuple[str, list[str]]:
        drawn = random.sample(words.of_at_least(size), size)
        common, rare = drawn[: self.common_words], drawn[self.common_words :]
        entries = common * repeats[0] + rare * repeats[1]
        Random(seed).shuffle(entries)
        return numbered(entries), common


@dataclass(frozen=True)
class Words:
    """The pool that lists are drawn from, and the longer one that takes its place for lists that it cannot fill."""

    pool: Sequence[str]
    longer: Sequence[str]

    def of_at_least(self, size: int) -> Sequence[str]:
        for words in (self.pool, self.longer):
            if size <= len(words):
                return words
        raise NotApplicableError(
            f"too long: a list of {size} different words was asked for, the word pool holds {len(self.pool)}; "
            "name a longer word list with --words"
        )


def numbered(words: list[str]) -> str:
    """`1. word 2. word ...`"""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
