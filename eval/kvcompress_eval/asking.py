"""Ask the questions of a unit, and those that follow from the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvcompress_eval.engines import Engine, Generation
from kvcompress_eval.rows import RowFile
from kvcompress_eval.tasks.questions import Question, Questions
from kvcompress_eval.units import Unit, prompt_sha256


def run_questions(engine: Engine, file: RowFile, unit: Unit, *, progress: Callable[[int, int], None]) -> None:
    """Ask what has no row yet, a batch of conversations at a time: first all first questions, then all second ones."""
    questions = unit.questions
    assert questions is not None, "RULER's units are run by the records"
    while len(file.rows) < len(questions.items):
        batch = questions.items[len(file.rows) :][: engine.batch_size]
        turns = 1 if questions.follow_up is None else 2
        told = _Told(progress, len(file.rows), len(questions.items), turns)
        first = engine.generate([item.prompt for item in batch], unit.max_tokens, answered=told)
        seconds: Sequence[tuple[Question, Generation] | None] = [None] * len(batch)
        if questions.follow_up is not None:
            asked = [questions.follow_up.ask(item, made.text) for item, made in zip(batch, first, strict=True)]
            again = replace(told, answers=len(batch))
            prompts = [item.prompt for item in asked]
            made = engine.generate(prompts, questions.follow_up.max_tokens, answered=again)
            seconds = list(zip(asked, made, strict=True))
        for item, answer, second in zip(batch, first, seconds, strict=True):
            file.append({"index": len(file.rows), **_row(questions, item, answer, second)})
        progress(len(file.rows), len(questions.items))


@dataclass(frozen=True)
class _Told:
    """Turns answers into samples done: `before` were done before the batch, `answers` of it are given already, and
    `turns` make a sample."""

    progress: Callable[[int, int], None]
    before: int
    total: int
    turns: int
    answers: int = 0

    def __call__(self, count: int) -> None:
        self.progress(self.before + (self.answers + count) // self.turns, self.total)


def _row(
    questions: Questions, item: Question, answer: Generation, second: tuple[Question, Generation] | None
) -> dict[str, Any]:
    """A conversation's row: the first answer's facts, the second's under `follow_up`, and the score of both."""
    row = {**_answer(item, answer), "score": questions.score(answer.text, item)}
    if second is None or questions.follow_up is None:
        return row
    again, made = second
    score = questions.score(made.text, again)
    row["follow_up"] = {**_answer(again, made), "score": score}
    if questions.follow_up.first_counts:
        row |= {"turns": [row["score"], score], "score": (row["score"] + score) / 2}
    else:
        row["score"] = score
    return row


def _answer(item: Question, made: Generation) -> dict[str, Any]:
    cached = {} if made.cached_tokens is None else {"cached_tokens": made.cached_tokens}
    return {**answer_row(item.prompt, item.references, made), **item.details, **cached}


def answer_row(prompt: Sequence[int], references: Sequence[str], made: Generation) -> dict[str, Any]:
    """What the row of any sample says of its prompt and its answer."""
    return {
        "prompt_sha256": prompt_sha256(prompt),
        "prompt_tokens": len(prompt),
        "prediction": made.text,
        "predicted_tokens": len(made.tokens),
        "tokens": list(made.tokens),
        "references": list(references),
    }
