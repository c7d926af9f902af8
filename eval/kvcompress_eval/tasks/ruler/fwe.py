"""RULER's frequent words extraction: name the three most frequent of the coded words drawn from a zeta distribution.

Specification: NVIDIA/RULER v1.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
from scipy.special import zeta

from kvcompress_eval.tasks.ruler.sample import NotApplicableError, Request, Sample, split_sample
from kvcompress_eval.tasks.ruler.sizing import Drawn
from kvcompress_eval.tasks.ruler.strings import strings
from kvcompress_eval.tasks.ruler.task import Task

LETTERS = 6
ANSWERS = 3


@dataclass(frozen=True)
class Fwe(Task):
    """Parameters of fwe: the exponent of the zeta distribution."""

    alpha: float = 2.0

    family = "fwe"

    def generate(self, request: Request) -> Iterator[Sample]:
        random = Random(request.seed)
        budget = request.length - self.tokens_to_generate
        vocabulary_size, step = budget // 50, budget // 32
        if vocabulary_size <= ANSWERS:
            raise NotApplicableError(f"too short: {request.length} tokens give {max(vocabulary_size, 0)} coded words")

        words = draw_vocabulary(random, request.seed, vocabulary_size)
        sized = budget // 6
        while self._render(request, words, sized).tokens < budget:
            sized += step
        sized -= step

        for index in range(request.samples):
            words = draw_vocabulary(random, request.seed, vocabulary_size)
            drawn = self._fitting(request, words, sized, step, budget)
            length = drawn.tokens + self.tokens_to_generate
            yield split_sample(index, drawn.prompt, drawn.outputs, strings("fwe").answer_prefix, length)

    def _fitting(self, request: Request, words: list[str], size: int, step: int, budget: int) -> Drawn:
        while size > 0:
            drawn = self._render(request, words, size)
            if drawn.tokens <= budget:
                return drawn
            size -= step
        raise NotApplicableError(f"too short: no text of these coded words fits into {budget} tokens")

    def _render(self, request: Request, words: list[str], size: int) -> Drawn:
        """The text of about `size` words; `words` are in rank order, the first is the noise `...`."""
        ranks = np.arange(1, len(words) + 1)
        counts = (size * ranks**-self.alpha / zeta(self.alpha)).astype(int)
        text = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        Random(request.seed).shuffle(text)
        prompt = request.prompt_template("fwe").format(context=" ".join(text))
        return Drawn(prompt, words[1 : 1 + ANSWERS], request.count(prompt))


def draw_vocabulary(random: Random, seed: int, size: int) -> list[str]:
    """`size` different coded words in rank order, the first replaced by `...`."""
    words = [random_code(random) for _ in range(size)]
    while len(set(words)) < size:
        words.append(random_code(random))
    vocabulary = sorted(set(words))
    Random(seed).shuffle(vocabulary)
    vocabulary[0] = "..."
    return vocabulary


def random_code(random: Random) -> str:
    return "".join(random.choices(string.ascii_lowercase, k=LETTERS))
