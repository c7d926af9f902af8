"""Run a suite on a model, or on a baseline and its compressed candidates, and write results.json.

Every model sees the same prompts, token for token. Results arrive on disk sample by sample, so that an interrupted
evaluation continues where it stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvcompress.codec.nested import WIDEST
from kvcompress_eval.engines import check_engine, is_url
from kvcompress_eval.engines.choosing import choose_engines
from kvcompress_eval.engines.names import AUTO
from kvcompress_eval.models import Model, describe_models, end_tokens, read_config
from kvcompress_eval.results import summarise
from kvcompress_eval.running import Run
from kvcompress_eval.suite import Suite, find_suite
from kvcompress_eval.tasks.catalogue import TASKS, check_task
from kvcompress_eval.tasks.data_files import DataSource
from kvcompress_eval.tasks.ruler import BASE, CHAT, NO_FILES, Sources, model_template, provenance
from kvcompress_eval.tokenizer import TextTokenizer
from kvcompress_eval.units import Progress
from kvcompress_eval.work import default_cache_dir, prepare

RESULTS = "results.json"
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64", "half")


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
    engine: str = AUTO,
    engine_options: Mapping[str, Any] | None = None,
    kv_rank: float = 1.0,
    kv_bits: int = WIDEST,
    dtype: str = "auto",
    seed: int = 42,
    template: str | None = None,
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
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Evaluate and write `OUT/results.json` and `OUT/samples/`.

    Args:
        model_dir: one candidate, or several (folders or hub ids).
        baseline: the model they are compared with.
        suite: name of a suite, or one's own.
        tasks: tasks in place of the suite's; `lengths`, `samples` and `drift_tokens` likewise.
        limit: at most this many samples per task.
        engine: transformers, vllm, the URL of a server that serves the one model given, or auto: vLLM for tasks where
            it can serve every model, and transformers for text. An engine that is named runs everything.
        engine_options: further arguments of the class of the engine named.
        kv_rank: share of the stored channels at which compressed models run.
        kv_bits: the most bits in which they store a channel.
        dtype: of the computation; auto is the checkpoint's, float32 on a CPU.
        template: the suite's by default; base; chat to ask through the tokenizer's chat template where a benchmark
            allows it; auto for chat if the tokenizer has such a template; or, for RULER only, one of its own
            templates (meta-llama3, Phi3, ...).
        sources: local files that some RULER tasks are made from.
        data: folder with the files of LongBench, as they ship.
        allow_network: download what `data` does not hold, through the `datasets` library.
        text: held-out text file; by default the several kinds of text that this package brings.
        margin: loss in points that the verdict tolerates.
        full_generations: generate every token, even once all references have been found. Scores are the same.
        serving_context: tokens of a prompt after which decode speed is measured; 0 leaves it out.
        noise_floor: run the first model on the tasks of the next seed too, and report how far the two lie apart.
        resume: reuse rows in OUT that the same models, seed and engine made.
        cache_dir: where generated prompts are kept.
        progress: called with what is done, how much, and of how much.
        say: called with remarks of one line: which engine was chosen, and why; that it did not start.

    Returns:
        What results.json holds.

    Raises:
        ValueError: bad arguments, models that do not belong together, or lengths a model cannot take.
    """
    began = time.monotonic()
    check_engine(engine)
    check_numbers(margin=margin, serving_context=serving_context, serving_tokens=serving_tokens, dtype=dtype)
    chosen = choose_suite(suite, tasks=tasks, lengths=lengths, samples=samples, limit=limit, drift_tokens=drift_tokens)
    template = chosen.template if template is None else template
    if template not in (BASE.name, CHAT, AUTO) and any(name in TASKS for name in chosen.tasks):
        raise ValueError(
            f"found template {template!r}; expected base, chat or auto: only RULER has templates of its own"
        )
    check_folder(Path(out))
    given = [model_dir] if isinstance(model_dir, str | Path) else list(model_dir)
    models = describe_models(given, baseline, kv_rank, kv_bits)
    smaller: dict[str, Any] = {} if kv_rank == 1.0 else {"kv_rank": kv_rank}
    smaller |= {} if kv_bits == WIDEST else {"kv_bits": kv_bits}
    if smaller and is_url(engine):
        words = " and ".join(f"--{name.replace('_', '-')}" for name in smaller)
        raise ValueError(f"a server has its own: give {words} to `kvcompress serve`, and leave it out here")
    if is_url(engine) and len(models) > 1:
        raise ValueError("a URL serves one model: evaluate the models one by one, without a baseline")
    if engine == AUTO and engine_options:
        raise ValueError(f"found options {', '.join(engine_options)} of an engine, and no engine that is named")
    tell = progress or _silent
    tokenizer = shared_tokenizer(models)
    ends = {model.name: end_tokens(model.folder, tokenizer) for model in models}
    if template == AUTO:
        template = CHAT if tokenizer.has_chat else BASE.name
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
    configs = {model.name: read_config(model.folder) for model in models}
    engines = choose_engines(engine, configs, tasks=[unit.task for unit in work.units], dtype=dtype)
    how = {
        "engine_options": {**(engine_options or {}), **smaller},
        "dtype": dtype,
        "full_generations": full_generations,
        "tokenizer_sha256": tokenizer.sha256,
        "seed": seed,
        "template": template,
        "files": provenance(sources),
    }
    running = Run(models, work, again, tokenizer, Path(out), how, ends, resume=resume, tell=tell)
    records, repeated, engines = running.everything(engines, say or _silent_line)
    results = summarise(
        records, work, margin=margin, seed=seed, how=how, engines=engines, repeated=repeated, again=again
    )
    results["environment"]["minutes"] = round((time.monotonic() - began) / 60, 2)
    _write_json(Path(out) / RESULTS, results)
    return results


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
    return replace(suite, text_tokens=0, agreement_prompts=0)


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


def check_folder(out: Path) -> None:
    """Refuse a place for results that cannot be a folder.

    Raises:
        ValueError: it, or what should hold it, is a file.
    """
    for place in (out, *out.parents):
        if place.exists():
            if not place.is_dir():
                raise ValueError(f"--out {out}: {place} is a file; expected a folder, or a name that is free")
            return


def check_numbers(*, margin: float, serving_context: int, serving_tokens: int, dtype: str) -> None:
    """Refuse numbers and names that could only fail later.

    Raises:
        ValueError: naming the option.
    """
    if not (math.isfinite(margin) and 0 <= margin <= 100):
        raise ValueError(f"found --margin {margin}; expected points, 0 to 100")
    if serving_context < 0 or serving_tokens < 0:
        raise ValueError(f"found --serving-context {serving_context}; expected a number of tokens, or 0 for none")
    if dtype not in DTYPES:
        raise ValueError(f"found --dtype {dtype!r}; expected {', '.join(DTYPES)}")


def _silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def _silent_line(line: str) -> None:
    """A remark that nobody reads."""


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    from kvcompress.checkpoint.atomic import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
