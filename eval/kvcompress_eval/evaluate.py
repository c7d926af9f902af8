"""Run a suite on a model, or on a baseline and its compressed candidates, and write results.json.

Every model sees the same prompts, token for token. Results arrive on disk sample by sample, so that an interrupted
evaluation continues where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvcompress.codec.nested import WIDEST
from kvcompress_eval.engines import check_engine, is_url, open_engine
from kvcompress_eval.models import Model, describe_models
from kvcompress_eval.suite import Suite, find_suite
from kvcompress_eval.tasks.agreement import Reference
from kvcompress_eval.tasks.catalogue import TASKS, check_task
from kvcompress_eval.tasks.data_files import DataSource
from kvcompress_eval.tasks.ruler import BASE, CHAT, NO_FILES, Sources, model_template, provenance
from kvcompress_eval.tokenizer import TextTokenizer
from kvcompress_eval.units import Progress
from kvcompress_eval.work import Work, default_cache_dir, prepare

RESULTS = "results.json"


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
    kv_rank: float = 1.0,
    kv_bits: int = WIDEST,
    dtype: str = "auto",
    seed: int = 42,
    template: str = "base",
    sources: Sources = NO_FILES,
    data: str | Path | None = None,
    allow_network: bool = False,
    drift_tokens: int | None = None,
    text: str | Path | None = None,
    margin: float = 1.0,
    full_generations: bool = False,
    serving_context: int = 0,
    serving_tokens: int = 32,
    noise_floor: bool = False,
    resume: bool = False,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate and write `OUT/results.json` and `OUT/samples/`.

    Args:
        model_dir: one candidate, or several (folders or hub ids).
        baseline: the model they are compared with.
        suite: name of a suite, or one's own.
        tasks: tasks in place of the suite's; `lengths`, `samples` and `drift_tokens` likewise.
        limit: at most this many samples per task.
        engine: transformers, vllm, or the URL of a server that serves the one model given.
        engine_options: further arguments of the engine's class.
        kv_rank: share of the stored channels at which compressed models run.
        kv_bits: the most bits in which they store a channel.
        dtype: of the computation; auto is the checkpoint's, float32 on a CPU.
        template: base; chat to ask through the tokenizer's chat template where a benchmark allows it; or, for RULER
            only, one of its own templates (meta-llama3, Phi3, ...).
        sources: local files that some RULER tasks are made from.
        data: folder with the files of LongBench, as they ship.
        allow_network: download what `data` does not hold, through the `datasets` library.
        text: held-out text file; by default the `heldout.txt` of a model folder.
        margin: loss in points that the verdict tolerates.
        full_generations: generate every token, even once all references have been found. Scores are the same.
        serving_context: tokens of a prompt after which decode speed is measured; 0 leaves it out.
        noise_floor: run the first model on the tasks of the next seed too, and report how far the two lie apart.
        resume: reuse rows in OUT that the same models, seed and engine made.
        cache_dir: where generated prompts are kept.
        progress: called with what is done, how much, and of how much.

    Returns:
        What results.json holds.

    Raises:
        ValueError: bad arguments, models that do not belong together, or lengths a model cannot take.
    """
    check_engine(engine)
    chosen = choose_suite(suite, tasks=tasks, lengths=lengths, samples=samples, limit=limit, drift_tokens=drift_tokens)
    if template not in (BASE.name, CHAT) and any(name in TASKS for name in chosen.tasks):
        raise ValueError(f"found template {template!r}; expected base or chat: only RULER has templates of its own")
    given = [model_dir] if isinstance(model_dir, str | Path) else list(model_dir)
    models = describe_models(given, baseline, kv_rank, kv_bits)
    smaller: dict[str, Any] = {} if kv_rank == 1.0 else {"kv_rank": kv_rank}
    smaller |= {} if kv_bits == WIDEST else {"kv_bits": kv_bits}
    if smaller and is_url(engine):
        words = " and ".join(f"--{name.replace('_', '-')}" for name in smaller)
        raise ValueError(f"a server has its own: give {words} to `kvcompress serve`, and leave it out here")
    if is_url(engine) and len(models) > 1:
        raise ValueError("a URL serves one model: evaluate the models one by one, without a baseline")
    tell = progress or _silent
    tokenizer = shared_tokenizer(models)
    prompts: dict[str, Any] = {
        "cache_dir": Path(cache_dir).expanduser() if cache_dir else default_cache_dir(),
        "progress": tell,
        "template": model_template(template, tokenizer.chat_turn),
        "sources": sources,
        "data": DataSource(Path(data).expanduser() if data else None, allow_network),
        "chat": template == CHAT,
    }
    work = prepare(
        chosen,
        models,
        tokenizer,
        seed=seed,
        text=text,
        serving_context=serving_context,
        serving_tokens=serving_tokens,
        **prompts,
    )
    if work.drift_prompts and (baseline is None or len(models) < 2):
        raise ValueError("drift compares candidates with a baseline; name one with --baseline")
    again = None
    if noise_floor and work.units:
        again = prepare(tasks_only(chosen), models[:1], tokenizer, seed=seed + 1, **prompts)
    how = {
        "engine": engine,
        "engine_options": {**(engine_options or {}), **smaller},
        "dtype": dtype,
        "full_generations": full_generations,
        "tokenizer_sha256": tokenizer.sha256,
        "seed": seed,
        "template": template,
        "files": provenance(sources),
    }
    results = _run_models(models, work, tokenizer, Path(out), how, margin=margin, again=again, resume=resume, tell=tell)
    _write_json(Path(out) / RESULTS, results)
    return results


def _run_models(
    models: Sequence[Model],
    work: Work,
    tokenizer: TextTokenizer,
    out: Path,
    how: Mapping[str, Any],
    *,
    margin: float,
    again: Work | None,
    resume: bool,
    tell: Progress,
) -> dict[str, Any]:
    """Run what is missing of each model in turn, one model in memory at a time; the first one on `again`, too."""
    from kvcompress_eval.records import Records
    from kvcompress_eval.results import summarise

    base = models[0] if models[0].role == "baseline" else None
    records = [
        Records(model, None if model is base else base, work, out / "samples", how, resume=resume) for model in models
    ]
    repeated = None
    if again is not None:
        seeded = {**how, "seed": how["seed"] + 1}
        repeated = Records(models[0], None, again, out / "samples" / "noise-floor", seeded, resume=resume)
    reference: Reference | None = None
    for record in records:
        repeats = repeated if record is records[0] and repeated is not None and repeated.pending else None
        gives_reference = record.model is base and any(other.needs_agreement for other in records)
        if not (record.pending or record.needs_agreement or gives_reference or repeats):
            continue
        tell(f"starting {how['engine']}: {record.model.name}", 0, 1)
        engine = open_engine(
            how["engine"],
            record.model.folder,
            tokenizer,
            max_context=max(item.max_context for item in (work, again) if item is not None),
            dtype=how["dtype"],
            **how["engine_options"],
        )
        try:
            for part in (record, repeats):
                if part is not None:
                    part.complete(engine, full_generations=how["full_generations"], tell=tell)
            if gives_reference:
                reference = record.collect_reference(engine, tell=tell)
            elif record.needs_agreement:
                assert reference is not None, "the baseline comes first"
                record.measure_agreement(engine, reference, seed=how["seed"], tell=tell)
        finally:
            engine.close()
    return summarise(records, work, margin=margin, seed=how["seed"], how=how, repeated=repeated, again=again)


def choose_suite(
    suite: str | Suite,
    *,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    samples: int | None = None,
    limit: int | None = None,
    drift_tokens: int | None = None,
) -> Suite:
    """A suite with parts of it replaced.

    Raises:
        ValueError: unknown suite or task, or a length or number that is not positive.
    """
    chosen = find_suite(suite) if isinstance(suite, str) else suite
    chosen = replace(
        chosen,
        tasks=tuple(tasks or chosen.tasks),
        lengths=tuple(lengths or chosen.lengths),
        samples=chosen.samples if samples is None else samples,
        drift_tokens=chosen.drift_tokens if drift_tokens is None else drift_tokens,
    )
    if limit is not None:
        chosen = replace(chosen, samples=min(limit, chosen.samples))
    for name in chosen.tasks:
        check_task(name)
    own_lengths = all(name in TASKS and TASKS[name].from_files for name in chosen.tasks)
    missing = not chosen.lengths and not own_lengths
    if chosen.tasks and (missing or chosen.samples < 1 or any(length < 1 for length in chosen.lengths)):
        raise ValueError(
            f"found lengths {list(chosen.lengths)} and {chosen.samples} samples; expected positive numbers of both"
        )
    return chosen


def tasks_only(suite: Suite) -> Suite:
    """The suite without its text and agreement."""
    return replace(suite, perplexity_tokens=0, agreement_windows=0, agreement_prompts=0)


def shared_tokenizer(models: Sequence[Model]) -> TextTokenizer:
    """The tokenizer of all models.

    Raises:
        ValueError: two models have different ones, so that they cannot be shown the same tokens.
    """
    first, *others = [TextTokenizer(model.folder) for model in models]
    for model, other in zip(models[1:], others, strict=True):
        if other.sha256 != first.sha256:
            raise ValueError(f"{model.path} has another tokenizer than {models[0].path}; compare models of one base")
    return first


def _silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    from kvcompress.checkpoint.atomic import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
