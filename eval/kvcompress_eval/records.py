"""The rows of one model, and the running of what is missing from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kvcompress_eval.asking import answer_row, run_questions
from kvcompress_eval.engines import Engine
from kvcompress_eval.models import Model
from kvcompress_eval.rows import RowFile
from kvcompress_eval.tasks import agreement, drift, perplexity, serving
from kvcompress_eval.units import Progress, Unit, prompt_sha256
from kvcompress_eval.work import Work

ROWS_VERSION = 2
"""Raised whenever rows made earlier would mean something else."""


class Records:
    """Everything measured on one model, kept in `folder`.

    Args:
        how: engine, dtype, seed and tokenizer: what rows depend on besides the model and their own input.
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
    ) -> None:
        self.model = model
        self._work = work

        def rows(unit: str, suffix: str, *inputs: Any) -> RowFile:
            parts = [ROWS_VERSION, model.fingerprint, dict(how), *inputs]
            digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
            return RowFile(folder / f"{unit}-{model.name}.{suffix}", run=digest, resume=resume)

        self.tasks = [rows(f"{unit.task}-{unit.length}", "jsonl", unit.max_tokens) for unit in work.units]
        for file, unit in zip(self.tasks, work.units, strict=True):
            _keep_matching(file, unit)
        text = [[window.tokens, window.scored] for window in work.windows]
        self.perplexity = rows("perplexity", "jsonl", text)
        self.serving = rows("serving", "json", work.serving_prompt, work.serving_tokens)
        self.agreement: RowFile | None = None
        if reference_model is not None and (work.agreement_texts or work.agreement_prompts or work.drift_prompts):
            asked = [work.agreement_texts, work.agreement_prompts, work.suite.agreement_new_tokens]
            asked += [work.drift_prompts, work.suite.drift_tokens]
            self.agreement = rows("agreement", "json", reference_model.fingerprint, asked)

    @property
    def needs_agreement(self) -> bool:
        return self.agreement is not None and not self.agreement.rows

    @property
    def pending(self) -> bool:
        """Whether anything but the agreement is missing."""
        units = zip(self.tasks, self._work.units, strict=True)
        return (
            any(len(file.rows) < len(unit.prompts) for file, unit in units)
            or len(self.perplexity.rows) < len(self._work.windows)
            or (bool(self._work.serving_prompt) and not self.serving.rows)
        )

    def complete(self, engine: Engine, *, full_generations: bool, tell: Progress) -> None:
        """Run what is missing, except the agreement."""
        for file, unit in zip(self.tasks, self._work.units, strict=True):
            what = f"{unit.task} at {unit.length}: {self.model.name}"
            if unit.questions is not None:
                run_questions(engine, file, unit, progress=partial(tell, what))
                continue
            _run_unit(engine, file, unit, full_generations=full_generations, progress=partial(tell, what))
        windows = self._work.windows
        missing = windows[len(self.perplexity.rows) :]
        for losses in perplexity.window_losses(engine, missing):
            self.perplexity.append({"window": len(self.perplexity.rows), "nll": [round(loss, 6) for loss in losses]})
            tell(f"perplexity: {self.model.name}", len(self.perplexity.rows), len(windows))
        if self._work.serving_prompt and not self.serving.rows:
            tell(f"decode speed: {self.model.name}", 0, 1)
            new_tokens = self._work.serving_tokens
            self.serving.append(serving.measure(engine, self._work.serving_prompt, new_tokens=new_tokens))

    def collect_reference(self, engine: Engine, *, tell: Progress) -> agreement.Reference:
        """What this model says where the others are to agree with it."""
        work = self._work
        reference = agreement.collect_reference(
            engine,
            work.agreement_texts,
            work.agreement_prompts,
            new_tokens=work.suite.agreement_new_tokens,
            progress=partial(tell, f"agreement: {self.model.name}"),
        )
        told = partial(tell, f"drift: {self.model.name}")
        continued = drift.collect_reference(engine, work.drift_prompts, work.suite.drift_tokens, progress=told)
        return replace(reference, drift=continued)

    def measure_agreement(self, engine: Engine, reference: agreement.Reference, *, seed: int, tell: Progress) -> None:
        """Compare this model with the reference."""
        assert self.agreement is not None
        found = agreement.measure(
            engine,
            reference,
            new_tokens=self._work.suite.agreement_new_tokens,
            seed=seed,
            progress=partial(tell, f"agreement: {self.model.name}"),
        )
        if reference.drift:
            told = partial(tell, f"drift: {self.model.name}")
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
        made = engine.generate(prompts, unit.max_tokens, until)
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
        progress(end, total)
