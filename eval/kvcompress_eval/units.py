"""Tasks at lengths, made into prompts: what is asked of every model, before any model is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from itertools import count
from operator import add
from typing import Any

from kvcompress_eval.suite import Suite
from kvcompress_eval.tasks import catalogue
from kvcompress_eval.tasks.questions import Ask, Questions
from kvcompress_eval.tasks.ruler import NotApplicableError, Sample, ruler_task, score, side_by_side, task_score
from kvcompress_eval.tokenizer import TextTokenizer

MAX_THREADS = 8
"""That make prompts; more than the tokenizer's share of the work would keep busy."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""


@dataclass(frozen=True)
class Unit:
    """One task at one length: prompts as token ids, references, and tokens to generate."""

    task: str
    length: int
    prompts: list[list[int]]
    references: list[tuple[str, ...]]
    max_tokens: int
    mean_length: float
    """Tokens used on average, generated ones included."""
    score: Callable[[str, Sequence[str]], float] | None = None
    """Of a prediction and its references, 0 to 1, where the task is RULER's."""
    labels: list[dict[str, Any]] = field(default_factory=list)
    """Per prompt, what its row carries besides the answer (see `rows`); nothing where empty."""
    questions: Questions | None = None
    """Where the task is not RULER's: the same prompts, how they are judged, and what is asked after them."""

    def points(self, scores: Sequence[float]) -> float:
        """Score of the task in points, rounded as its benchmark rounds: LongBench multiplies by 100 before it divides
        by the number of samples, RULER after it."""
        if self.questions is None:
            return task_score(scores)
        return round(100 * reduce(add, scores) / len(scores), 2)


@dataclass(frozen=True)
class Skipped:
    """A task that cannot be made at this length with this tokenizer."""

    task: str
    length: int
    reason: str


def prompt_sha256(prompt: Sequence[int]) -> str:
    """Hash of a prompt's token ids."""
    return hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()


def ruler_units(
    suite: Suite, tokenizer: TextTokenizer, make: Callable[[str, int], list[Sample]], progress: Progress
) -> tuple[list[Unit], list[Skipped]]:
    """Units of RULER's tasks, made side by side."""
    units: list[Unit] = []
    skipped: list[Skipped] = []
    wanted = [(name, length) for length in suite.lengths for name in suite.tasks]
    if wanted:
        progress("making prompts", 0, len(wanted))
    threads = min(os.cpu_count() or 1, MAX_THREADS)
    for done, (name, length), made in zip(count(1), wanted, side_by_side(make, wanted, threads), strict=False):
        progress("making prompts", done, len(wanted))
        if isinstance(made, NotApplicableError):
            skipped.append(Skipped(name, length, str(made)))
            continue
        task = ruler_task(name)
        units.append(
            Unit(
                task=name,
                length=length,
                prompts=[tokenizer.encode_prompt(sample.prompt) for sample in made],
                references=[sample.outputs for sample in made],
                max_tokens=task.tokens_to_generate,
                mean_length=sum(sample.length for sample in made) / len(made),
                score=partial(score, metric=task.metric),
                labels=[_depth(sample.prompt, sample.outputs) for sample in made],
            )
        )
    return units, skipped


def other_units(
    names: Sequence[str], lengths: Sequence[int], ask: Ask, limit: int | None, progress: Progress
) -> tuple[list[Unit], list[Skipped]]:
    """Units of the tasks beside RULER's. Without lengths, those from files get as much room as the models have."""
    units: list[Unit] = []
    skipped: list[Skipped] = []
    wanted = [(name, length) for length in lengths or (0,) for name in names]
    for done, (name, length) in enumerate(wanted):
        progress("making prompts", done, len(wanted))
        task = catalogue.TASKS[name]
        room = length or limit
        if limit and length > limit:
            raise ValueError(f"{name} at {length} tokens does not fit models made for {limit}; choose shorter lengths")
        try:
            made = task.make(replace(ask, room=room))
        except NotApplicableError as error:
            skipped.append(Skipped(name, room or 0, str(error)))
            continue
        prompts = [item.prompt for item in made.items]
        units.append(
            Unit(
                task=name,
                length=room or made.needs,
                prompts=prompts,
                references=[item.references for item in made.items],
                max_tokens=made.max_tokens,
                mean_length=sum(map(len, prompts)) / len(prompts) + made.max_tokens,
                questions=made,
            )
        )
    if wanted:
        progress("making prompts", len(wanted), len(wanted))
    return units, skipped


def _depth(prompt: str, references: Sequence[str]) -> dict[str, Any]:
    """Where in the prompt the answer stands, to the nearest 10 %, if there is one answer and it stands there once."""
    if len(references) != 1 or prompt.count(references[0]) != 1:
        return {}
    return {"depth": round(10 * prompt.index(references[0]) / len(prompt)) * 10}


def fitted(unit: Unit, limit: int | None, special: int) -> Unit:
    """The unit with its generation cut by the special tokens that the benchmark does not count, if they overflow.

    Prompts are never cut.
    """
    longest = max(len(prompt) for prompt in unit.prompts)
    if limit is None or longest + unit.max_tokens <= limit:
        return unit
    if longest + unit.max_tokens <= limit + special:
        return Unit(**{**vars(unit), "max_tokens": limit - longest})
    raise ValueError(
        f"{unit.task} at {unit.length} tokens does not fit a model made for {limit} tokens; choose shorter lengths"
    )
