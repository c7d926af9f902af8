"""RULER's questions: documents that answer one, among documents that do not.

Files are the datasets' own: SQuAD 2.0 (questions without an answer left out; a question's article lends its other
paragraphs first) and HotpotQA's development set in the distractor setting (ten paragraphs per question).

Specification: NVIDIA/RULER v1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import ClassVar, Literal

from kvcompress_eval.tasks.ruler.sample import NotApplicableError, Request, Sample, split_sample
from kvcompress_eval.tasks.ruler.scoring import Metric
from kvcompress_eval.tasks.ruler.sizing import Drawn, draw_fitting, search_size
from kvcompress_eval.tasks.ruler.sources import kept, read_json
from kvcompress_eval.tasks.ruler.strings import strings
from kvcompress_eval.tasks.ruler.task import Task

STEP = 10


@dataclass(frozen=True)
class Question:
    """A question; documents are named by their place in the sorted set of all."""

    query: str
    outputs: list[str]
    documents: list[int]
    """Always shown: the answer is in one or more of these."""
    related: list[int]
    """Shown before others."""


@dataclass(frozen=True)
class Questions:
    """A data set's questions in its order, and the sorted set of its documents."""

    questions: list[Question]
    documents: list[str]


@dataclass(frozen=True)
class Qa(Task):
    """Parameter of a qa task: the data set."""

    dataset: Literal["squad", "hotpotqa"]

    family = "qa"
    metric: ClassVar[Metric] = "part"

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.dataset,)

    def generate(self, request: Request) -> Iterator[Sample]:
        path = request.sources.path(self.dataset)
        data = squad(path) if self.dataset == "squad" else hotpotqa(path)
        if request.samples > len(data.questions):
            raise ValueError(
                f"{path} has {len(data.questions)} answerable questions, {request.samples} samples were asked for"
            )
        random = Random(request.seed)
        budget = request.length - self.tokens_to_generate

        def draw(question: Question, size: int) -> Drawn:
            prompt = self._prompt(random, request, data, question, size)
            return Drawn(prompt, question.outputs, request.count(prompt))

        first = data.questions[0]
        tokens_per_document = draw(first, STEP).tokens / STEP
        upper = max(int(request.length / tokens_per_document * 3), 2 * STEP)
        size = search_size(lambda n: draw(first, n).tokens, STEP, upper, budget)
        for index, question in enumerate(data.questions[: request.samples]):
            drawn = draw_fitting(partial(draw, question), size, STEP, budget)
            length = drawn.tokens + self.tokens_to_generate
            yield split_sample(index, drawn.prompt, drawn.outputs, strings("qa").answer_prefix, length)

    def _prompt(self, random: Random, request: Request, data: Questions, question: Question, size: int) -> str:
        """The question after `size` documents in an order of their own."""
        chosen = self._choose(random, data, question, size)
        Random(request.seed).shuffle(chosen)
        document = strings("qa").document
        context = "\n\n".join(document.format(number=number, text=text) for number, text in enumerate(chosen, start=1))
        return request.prompt_template("qa").format(context=context, query=question.query)

    def _choose(self, random: Random, data: Questions, question: Question, size: int) -> list[str]:
        """The question's documents, then related ones, then any; all of them, over and over, if there are too few."""
        texts, own, related = data.documents, question.documents, question.related
        if size >= len(texts):
            return (texts * -(-size // len(texts)))[:size]
        room = size - len(own)
        if room < 0:
            raise NotApplicableError(f"too short: a question needs its {len(own)} documents, {size} fit")
        if room > len(related):
            taken = {*own, *related}
            others = [place for place in range(len(texts)) if place not in taken]
            chosen = [*own, *related, *random.sample(others, room - len(related))]
        else:
            chosen = [*own, *random.sample(related, room)]
        return [texts[place] for place in chosen]


@kept
def squad(path: Path) -> Questions:
    """SQuAD 2.0.

    Raises:
        ValueError: another file.
    """
    content = read_json(path)
    try:
        articles = [article["paragraphs"] for article in content["data"]]
        texts, place = _documents(paragraph["context"] for paragraphs in articles for paragraph in paragraphs)
        questions: list[Question] = []
        for paragraphs in articles:
            places = [place[paragraph["context"]] for paragraph in paragraphs]
            for own, paragraph in zip(places, paragraphs, strict=True):
                related = [other for other in places if other != own]
                questions += [
                    Question(item["question"], [answer["text"] for answer in item["answers"]], [own], related)
                    for item in paragraph["qas"]
                    if not item["is_impossible"]
                ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not SQuAD 2.0: {_lacking(error)}") from error
    return _checked(path, questions, texts)


@kept
def hotpotqa(path: Path) -> Questions:
    """HotpotQA, distractor setting.

    Raises:
        ValueError: another file.
    """
    content = read_json(path)
    try:
        items = [(item, [f"{title}\n{''.join(lines)}" for title, lines in item["context"]]) for item in content]
        texts, place = _documents(text for _, context in items for text in context)
        questions = [
            Question(item["question"], [item["answer"]], [place[text] for text in context], [])
            for item, context in items
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not HotpotQA in the distractor setting: {_lacking(error)}") from error
    return _checked(path, questions, texts)


def _documents(contexts: Iterator[str]) -> tuple[list[str], dict[str, int]]:
    """The sorted set, and the place of each text in it."""
    texts = sorted(set(contexts))
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a document that is no text")
    return texts, {text: place for place, text in enumerate(texts)}


def _checked(path: Path, questions: list[Question], texts: list[str]) -> Questions:
    if not questions:
        raise ValueError(f"{path} holds no question that can be answered")
    for number, question in enumerate(questions, start=1):
        found = [question.query, *question.outputs]
        if len(found) < 2 or not all(isinstance(text, str) and text for text in found):
            shown = json.dumps(found, ensure_ascii=False, default=str)[:80]
            raise ValueError(f"{path}, question {number}: found {shown}; expected its text and at least one answer")
    return Questions(questions, texts)


def _lacking(error: Exception) -> str:
    return f"no field {error}" if isinstance(error, KeyError) else str(error)
