"""The rows of one model, and the running of what is missing from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kvcompress_eval.asking import answer_row, run_questions
from kvcompress_eval.engines import Engine, Scores
from kvcompress_eval.models import Model
from kvcompress_eval.rows import RowFile
from kvcompress_eval.tasks import agreement, drift, serving
from kvcompress_eval.units import Progress, Unit, prompt_sha256
from kvcompress_eval.work import Work

ROWS_VERSION = 3
"""Raised whenever rows made earlier would mean something else."""

DECODE_COST = 4
"""Tokens of a prompt that take about as long as one generated token. Only the time left is estimated with it."""


class Records:
    """Everything measured on one model, kept in `folder`.

    Args:
        how: engine, dtype, seed and tokenizer: what rows depend on besides the model and their own input.
        text_engine: the engine that reads text and gives distributions, which may be another than that of the tasks.
        ends: tokens at which the model stops.
        label: the model's name in what is told of the progress.
        reference_model: the model that agreement is measured against; None where there is none.
    """

    def __init__(
        self,
        model: Model,
        reference_model: Model | None,
        work: Work,
        folder: Path,
        how: Mapping[str, Any],
        *,
        resume: bool,
        text_engine: str | None = None,
        ends: Iterable[int] = (),
        label: str | None = None,
    ) -> None:
        self.model = model
        self._label = label or model.name
        self._work = work
        asked = {**how, "end_tokens": sorted(ends)}

        def rows(unit: str, suffix: str, *inputs: Any, engine: str | None = None) -> RowFile:
            parts = [ROWS_VERSION, model.fingerprint, asked | ({"engine": engine} if engine else {}), *inputs]
            digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
            return RowFile(folder / f"{unit}-{model.name}.{suffix}", run=digest, resume=resume)

        self.tasks = [rows(f"{unit.task}-{unit.length}", "jsonl", unit.max_tokens) for unit in work.units]
        for file, unit in zip(self.tasks, work.units, strict=True):
            _keep_matching(file, unit)
        against = None if reference_model is None else reference_model.fingerprint
        text = [[window.tokens, window.scored] for window in work.windows]
        self.text = rows("text", "jsonl", text, against, engine=text_engine)
        self.serving = rows("serving", "json", work.serving_prompt, work.serving_tokens)
        self.agreement: RowFile | None = None
        if reference_model is not None and (work.agreement_prompts or work.drift_prompts):
            asked_of_both = [work.agreement_prompts, work.suite.agreement_new_tokens]
            asked_of_both += [work.drift_prompts, work.suite.drift_tokens]
            self.agreement = rows("agreement", "json", against, asked_of_both, engine=text_engine)

    @property
    def needs_agreement(self) -> bool:
        return self.agreement is not None and not self.agreement.rows

    @property
    def missing_windows(self) -> range:
        """Numbers of the windows of text that have no row."""
        return range(len(self.text.rows), len(self._work.windows))

    @property
    def tasks_pending(self) -> bool:
        """Whether an answer or the decode speed is missing."""
        units = zip(self.tasks, self._work.units, strict=True)
        return any(len(file.rows) < len(unit.prompts) for file, unit in units) or (
            bool(self._work.serving_prompt) and not self.serving.rows
        )

    def costs(self) -> dict[str, float]:
        """Tokens that each step of `run_tasks` and `run_text` has to do, by the step's name; a measure of its time."""
        found = {}
        for file, unit in zip(self.tasks, self._work.units, strict=True):
            tokens = sum(map(len, unit.prompts)) + DECODE_COST * unit.max_tokens * len(unit.prompts)
            found[self._step(f"{unit.task} at {unit.length}")] = tokens if len(file.rows) < len(unit.prompts) else 0
        if self.missing_windows:
            found[self._step("text")] = sum(len(window.tokens) for window in self._work.windows)
        if self.needs_agreement or self.agreement is None:
            new = self._work.suite.agreement_new_tokens
            found[self._step("agreement")] = sum(
                2 * len(prompt) + (1 + DECODE_COST) * new for prompt in self._work.agreement_prompts
            )
            found[self._step("drift")] = sum(
                (1 + DECODE_COST * (self.agreement is None)) * self._work.suite.drift_tokens
                for _ in self._work.drift_prompts
            )
        return {step: float(cost) for step, cost in found.items() if cost}

    def _step(self, what: str) -> str:
        return f"{what}: {self._label}"

    def run_tasks(self, engine: Engine, *, full_generations: bool, tell: Progress) -> None:
        """Ask what has no answer yet; measure the decode speed."""
        for file, unit in zip(self.tasks, self._work.units, strict=True):
            told = partial(tell, self._step(f"{unit.task} at {unit.length}"))
            if len(file.rows) < len(unit.prompts):
                told(len(file.rows), len(unit.prompts))
            if unit.questions is not None:
                run_questions(engine, file, unit, progress=told)
                continue
            _run_unit(engine, file, unit, full_generations=full_generations, progress=told)
        if self._work.serving_prompt and not self.serving.rows:
            tell(self._step("decode speed"), 0, 1)
            new_tokens = self._work.serving_tokens
            self.serving.append(serving.measure(engine, self._work.serving_prompt, new_tokens=new_tokens))
            tell(self._step("decode speed"), 1, 1)

    def run_text(
        self,
        engine: Engine,
        *,
        tell: Progress,
        reference: agreement.Reference | None = None,
        again: range | None = None,
    ) -> dict[int, tuple[agreement.Part, Scores]]:
        """Read the windows that have no row.

        Args:
            reference: the base model's scores, for a candidate.
            again: further windows, whose scores are wanted by others; those of all windows read are then returned.
        """
        keep: dict[int, tuple[agreement.Part, Scores]] | None = None if again is None else {}
        first = min([self.missing_windows.start, *(again or ())[:1]])
        numbers = range(first, len(self._work.windows))
        if numbers:
            tell(self._step("text"), first, len(self._work.windows))
        for row in agreement.text_rows(engine, self._work.windows, numbers, reference=reference, keep=keep):
            if row["window"] == len(self.text.rows):
                self.text.append(row)
            tell(self._step("text"), row["window"] + 1, len(self._work.windows))
        return keep or {}

    def collect_reference(self, engine: Engine, *, tell: Progress) -> agreement.Reference:
        """What this model answers to the prompts on which the others are to agree with it."""
        work = self._work
        told = partial(tell, self._step("agreement"))
        reference = agreement.collect_reference(
            engine, work.agreement_prompts, new_tokens=work.suite.agreement_new_tokens, progress=told
        )
        told = partial(tell, self._step("drift"))
        continued = drift.collect_reference(engine, work.drift_prompts, work.suite.drift_tokens, progress=told)
        return replace(reference, drift=continued)

    def measure_agreement(self, engine: Engine, reference: agreement.Reference, *, seed: int, tell: Progress) -> None:
        """Compare this model's answers with the reference."""
        assert self.agreement is not None
        told = partial(tell, self._step("agreement"))
        new_tokens = self._work.suite.agreement_new_tokens
        found = agreement.measure(engine, reference, new_tokens=new_tokens, seed=seed, progress=told)
        if reference.drift:
            told = partial(tell, self._step("drift"))
            found["drift"] = drift.measure(engine, reference.drift, seed=seed, progress=told)
        self.agreement.append(found)


def _keep_matching(file: RowFile, unit: Unit) -> None:
    """Drop rows from the first on that answers another prompt than the one now asked."""
    for at, (row, prompt) in enumerate(zip(file.rows, unit.prompts, strict=False)):
        if row["prompt_sha256"] != prompt_sha256(prompt):
            del file.rows[at:]
            return


def _run_unit(engine: Engine, file: RowFile, unit: Unit, *, full_generations: bool, progress: Any) -> None:
    assert unit.score is not None, "units with questions are run by `asking`"
    total = len(unit.prompts)
    while len(file.rows) < total:
        start = len(file.rows)
        end = min(start + engine.batch_size, total)
        prompts, references = unit.prompts[start:end], unit.references[start:end]
        until = None if full_generations else references
        told = partial(_tell_answers, progress, start, total)
        made = engine.generate(prompts, unit.max_tokens, until, answered=told)
        labels = unit.labels[start:end] or [{}] * len(prompts)
        for prompt, expected, generation, label in zip(prompts, references, made, labels, strict=True):
            file.append(
                {
                    "index": len(file.rows),
                    **label,
                    **answer_row(prompt, expected, generation),
                    "score": unit.score(generation.text, expected),
                }
            )


def _tell_answers(progress: Any, before: int, total: int, answered: int) -> None:
    progress(before + answered, total)
