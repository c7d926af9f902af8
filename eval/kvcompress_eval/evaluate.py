"""Run a suite on a model, or on a baseline and its compressed candidates, and write results.json.

Every model sees the same prompts, token for token. Results arrive on disk sample by sample, so that an interrupted
evaluation continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvcompress_eval.engines import Engine, check_engine, is_url, open_engine
from kvcompress_eval.models import Model, describe_models
from kvcompress_eval.rows import RowFile
from kvcompress_eval.suite import Suite, find_suite
from kvcompress_eval.tasks import agreement, perplexity, serving
from kvcompress_eval.tasks.ruler import TASKS, score
from kvcompress_eval.tokenizer import TextTokenizer
from kvcompress_eval.work import Progress, Unit, Work, default_cache_dir, prepare, prompt_sha256

RESULTS = "results.json"
ROWS_VERSION = 1
"""Raised whenever rows made earlier would mean something else."""


def run(
    model_dir: str | Path | Sequence[str | Path],
    *,
    out: str | Path,
    baseline: str | Path | None = None,
    suite: str | Suite = "quick",
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    samples: int | None = None,
    limit: int | None = None,
    engine: str = "transformers",
    engine_options: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    seed: int = 42,
    text: str | Path | None = None,
    margin: float = 1.0,
    full_generations: bool = False,
    serving_context: int = 0,
    serving_tokens: int = 32,
    resume: bool = False,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate and write `OUT/results.json` and `OUT/samples/`.

    Args:
        model_dir: one candidate, or several (folders or hub ids).
        baseline: the model they are compared with.
        suite: name of a suite, or one's own.
        tasks: RULER tasks in place of the suite's; `lengths` and `samples` likewise.
        limit: at most this many samples per task.
        engine: transformers, vllm, or the URL of a server that serves the one model given.
        engine_options: further arguments of the engine's class.
        dtype: of the computation; auto is the checkpoint's, float32 on a CPU.
        text: held-out text file; by default the `heldout.txt` of a model folder.
        margin: loss in points that the verdict tolerates.
        full_generations: generate every token, even once all references have been found. Scores are the same.
        serving_context: tokens of a prompt after which decode speed is measured; 0 leaves it out.
        resume: reuse rows in OUT that the same models, seed and engine made.
        cache_dir: where generated prompts are kept.
        progress: called with what is done, how much, and of how much.

    Returns:
        What results.json holds.

    Raises:
        ValueError: bad arguments, models that do not belong together, or lengths a model cannot take.
    """
    from kvcompress_eval.results import summarise

    check_engine(engine)
    chosen = _chosen_suite(suite, tasks, lengths, samples, limit)
    candidates = [model_dir] if isinstance(model_dir, str | Path) else list(model_dir)
    models = describe_models(candidates, baseline)
    if is_url(engine) and len(models) > 1:
        raise ValueError("a URL serves one model: evaluate the models one by one, without a baseline")
    tell = progress or (lambda what, done, total: None)
    tokenizer = _shared_tokenizer(models)
    work = prepare(
        chosen,
        models,
        tokenizer,
        seed=seed,
        text=text,
        cache_dir=Path(cache_dir).expanduser() if cache_dir else default_cache_dir(),
        serving_context=serving_context,
        serving_tokens=serving_tokens,
        progress=tell,
    )
    how = {
        "version": ROWS_VERSION,
        "engine": engine,
        "options": dict(engine_options or {}),
        "dtype": dtype,
        "seed": seed,
        "full_generations": full_generations,
        "max_context": work.max_context,
        "tokenizer": tokenizer.sha256,
    }
    folder = Path(out)
    records = [_Records(model, models[0], work, folder / "samples", how, resume=resume) for model in models]
    reference: agreement.Reference | None = None
    compares = len(models) > 1 and models[0].role == "baseline"
    wanted = [compares and record.needs_agreement for record in records]
    for index, record in enumerate(records):
        is_base = index == 0
        needs_reference = is_base and any(wanted[1:])
        if not (record.pending or needs_reference or (not is_base and wanted[index])):
            continue
        tell(f"starting {engine} on {record.model.name}", 0, 1)
        running = open_engine(
            engine,
            record.model.folder,
            tokenizer,
            max_context=work.max_context,
            dtype=dtype,
            **dict(engine_options or {}),
        )
        try:
            _run_model(running, record, work, full_generations=full_generations, tell=tell)
            if needs_reference:
                reference = agreement.collect_reference(
                    running,
                    work.agreement_texts,
                    work.agreement_prompts,
                    new_tokens=chosen.agreement_new_tokens,
                    progress=lambda done, total: tell(f"agreement: {models[0].name}", done, total),
                )
            elif not is_base and wanted[index]:
                assert reference is not None
                name = record.model.name
                record.agreement.append(
                    agreement.measure(
                        running,
                        reference,
                        new_tokens=chosen.agreement_new_tokens,
                        seed=seed,
                        progress=lambda done, total, name=name: tell(f"agreement: {name}", done, total),  # type: ignore[misc]
                    )
                )
        finally:
            running.close()
    results = summarise(records, work, margin=margin, seed=seed, how=how)
    _write_json(folder / RESULTS, results)
    return results


@dataclass
class _Records:
    """The rows of one model."""

    model: Model
    first: Model
    work: Work
    folder: Path
    how: Mapping[str, Any]
    resume: bool = field(kw_only=True)

    def __post_init__(self) -> None:
        suite, work = self.work.suite, self.work
        self.tasks = [
            self._file(
                f"{unit.task}-{unit.length}",
                "jsonl",
                [unit.task, unit.length, unit.max_tokens],
            )
            for unit in work.units
        ]
        cut = [[list(window.tokens), window.scored] for window in work.windows]
        self.perplexity = self._file("perplexity", "jsonl", cut) if work.windows else None
        asked = [self.first.fingerprint, work.agreement_texts, work.agreement_prompts, suite.agreement_new_tokens]
        self.agreement = self._file("agreement", "json", asked)
        self.serving = self._file("serving", "json", [work.serving_prompt, work.serving_tokens])

    def _file(self, unit: str, suffix: str, inputs: Any) -> RowFile:
        parts = [self.model.fingerprint, dict(self.how), inputs]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return RowFile(self.folder / f"{unit}-{self.model.name}.{suffix}", run=digest, resume=self.resume)

    @property
    def needs_agreement(self) -> bool:
        asked = self.work.agreement_texts or self.work.agreement_prompts
        return bool(asked) and not self.agreement.rows

    @property
    def pending(self) -> bool:
        """Whether any row but the agreement is missing."""
        rows = zip(self.tasks, self.work.units, strict=True)
        return (
            any(len(file.rows) < len(unit.prompts) for file, unit in rows)
            or (self.perplexity is not None and len(self.perplexity.rows) < len(self.work.windows))
            or (bool(self.work.serving_prompt) and not self.serving.rows)
        )
