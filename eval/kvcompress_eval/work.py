"""The work of an evaluation, spelled out before any model is loaded: prompts, windows of text, and what fits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from kvcompress_eval.models import Model
from kvcompress_eval.suite import Suite
from kvcompress_eval.tasks import catalogue
from kvcompress_eval.tasks.data_files import DataSource
from kvcompress_eval.tasks.perplexity import Window, windows
from kvcompress_eval.tasks.questions import Ask, Questions
from kvcompress_eval.tasks.ruler import (
    ModelTemplate,
    NotApplicableError,
    Sample,
    Sources,
    check_sources,
    generate,
    ruler_task,
    score,
    side_by_side,
)
from kvcompress_eval.tasks.text import HeldOutText, find_text, read_text
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


@dataclass(frozen=True)
class Skipped:
    """A task that cannot be made at this length with this tokenizer."""

    task: str
    length: int
    reason: str


@dataclass(frozen=True)
class Work:
    """Everything to be run on every model."""

    suite: Suite
    units: list[Unit]
    skipped: list[Skipped]
    text: HeldOutText | None
    windows: list[Window]
    window: int
    stride: int
    agreement_texts: list[list[int]]
    agreement_prompts: list[list[int]]
    serving_prompt: list[int]
    serving_tokens: int
    max_context: int
    drift_prompts: list[list[int]]


def prepare(
    suite: Suite,
    models: Sequence[Model],
    tokenizer: TextTokenizer,
    *,
    seed: int,
    template: ModelTemplate,
    sources: Sources,
    cache_dir: Path,
    progress: Progress,
    data: DataSource = DataSource(),  # noqa: B008, it is frozen
    chat: bool = False,
    text: str | Path | None = None,
    serving_context: int = 0,
    serving_tokens: int = 0,
) -> Work:
    """Make every prompt and window.

    Raises:
        ValueError: a model cannot take the lengths, there is no text where one is needed, or nothing is left to do.
    """
    limits = [model.context for model in models if model.context]
    limit = min(limits) if limits else None
    others = tuple(name for name in suite.tasks if name in catalogue.TASKS)
    ruler = replace(suite, tasks=tuple(name for name in suite.tasks if name not in others))
    check_sources(ruler.tasks, sources)
    make = partial(
        generate,
        samples=suite.samples,
        seed=seed,
        count=tokenizer.count,
        tokenizer_sha256=tokenizer.sha256,
        template=template,
        sources=sources,
        cache_dir=cache_dir,
    )
    units, skipped = _units(ruler, tokenizer, lambda task, length: make(task, length=length), progress)
    ask = Ask(None, suite.samples, seed, tokenizer, data, chat)
    asked, not_asked = _asked_units(others, suite.lengths, ask, limit, progress)
    units, skipped = units + asked, skipped + not_asked
    units = [_fitted(unit, limit, len(tokenizer.prefix)) for unit in units]
    window = min(suite.window, limit - 1) if limit else suite.window
    stride = min(suite.stride, window // 2)
    held_out, cut, texts = _text(suite, models, tokenizer, text, window, stride)
    prompts = _agreement_prompts(units, suite, limit)
    drift = _drift_prompts(suite, held_out, tokenizer, limit)
    serving = _serving_prompt(units, texts, serving_context) if serving_context else []
    if serving and limit and serving_context + serving_tokens + 1 > limit:
        raise ValueError(
            f"decode speed after {serving_context} tokens does not fit a model made for {limit}; choose fewer tokens"
        )
    needs = [len(prompt) + unit.max_tokens for unit in units for prompt in unit.prompts]
    needs += [unit.questions.needs for unit in units if unit.questions is not None]
    needs += [len(prompt) + suite.drift_tokens + 1 for prompt in drift]
    needs += [len(window.tokens) + 1 for window in cut] + [len(item) + 1 for item in texts]
    needs += [len(prompt) + suite.agreement_new_tokens + 1 for prompt in prompts]
    needs += [len(serving) + serving_tokens + 1] if serving else []
    if not needs:
        reasons = "; ".join(f"{item.task} at {item.length}: {item.reason}" for item in skipped)
        raise ValueError(f"nothing to evaluate: {reasons or 'the suite is empty'}")
    return Work(
        suite=suite,
        units=units,
        skipped=skipped,
        text=held_out,
        windows=cut,
        window=window,
        stride=stride,
        agreement_texts=texts if suite.agreement_windows else [],
        agreement_prompts=prompts,
        serving_prompt=serving,
        serving_tokens=serving_tokens,
        max_context=min(max(needs), limit) if limit else max(needs),
        drift_prompts=drift,
    )


def default_cache_dir() -> Path:
    """~/.cache/kvcompress, or where XDG_CACHE_HOME points."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvcompress"


def prompt_sha256(prompt: Sequence[int]) -> str:
    """Hash of a prompt's token ids."""
    return hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()


def _units(
    suite: Suite, tokenizer: TextTokenizer, make: Callable[[str, int], list[Sample]], progress: Progress
) -> tuple[list[Unit], list[Skipped]]:
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


def _asked_units(
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


def _fitted(unit: Unit, limit: int | None, special: int) -> Unit:
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


def _text(
    suite: Suite,
    models: Sequence[Model],
    tokenizer: TextTokenizer,
    text: str | Path | None,
    window: int,
    stride: int,
) -> tuple[HeldOutText | None, list[Window], list[list[int]]]:
    wanted = max(
        suite.perplexity_tokens, suite.agreement_windows * suite.stride, suite.drift_prompts * suite.drift_context
    )
    if not wanted:
        return None, [], []
    path = find_text(text, [model.folder for model in models])
    if path is None:
        raise ValueError(
            "perplexity, agreement and drift need a text, and no model folder has a heldout.txt; name one with --text"
        )
    held_out = read_text(path, tokenizer, wanted)
    cut: list[Window] = []
    if suite.perplexity_tokens:
        cut = list(windows(held_out.tokens[: suite.perplexity_tokens], window, stride, tokenizer.prefix))
    starts = range(0, min(len(held_out.tokens), suite.agreement_windows * stride), stride)
    pieces = (held_out.tokens[start : start + stride] for start in starts)
    return held_out, cut, [[*tokenizer.prefix, *piece] for piece in pieces if len(piece) > 1]


def _drift_prompts(
    suite: Suite, held_out: HeldOutText | None, tokenizer: TextTokenizer, limit: int | None
) -> list[list[int]]:
    """Beginnings of text that the baseline will continue."""
    if not suite.drift_prompts or held_out is None:
        return []
    size = suite.drift_context
    if limit and len(tokenizer.prefix) + size + suite.drift_tokens + 1 > limit:
        raise ValueError(
            f"drift over {suite.drift_tokens} tokens after {size} does not fit a model made for {limit} tokens; choose "
            "fewer with --drift-tokens"
        )
    if len(held_out.tokens) < size:
        raise ValueError(f"{held_out.name} has {len(held_out.tokens)} tokens; drift needs at least {size}")
    count = min(suite.drift_prompts, len(held_out.tokens) // size)
    return [[*tokenizer.prefix, *held_out.tokens[at * size : (at + 1) * size]] for at in range(count)]


def _serving_prompt(units: Sequence[Unit], texts: Sequence[Sequence[int]], context: int) -> list[int]:
    """A prompt of `context` tokens made of the longest prompt at hand, repeated."""
    source = max([*(prompt for unit in units for prompt in unit.prompts), *texts], key=len, default=[1])
    return (list(source) * (context // len(source) + 1))[:context]


def _agreement_prompts(units: Sequence[Unit], suite: Suite, limit: int | None) -> list[list[int]]:
    """The first prompt of every unit, then the second of every unit, and so on, as long as answers fit behind them."""
    room = limit - suite.agreement_new_tokens - 1 if limit else None
    longest = max((len(unit.prompts) for unit in units), default=0)
    turns = [unit.prompts[at] for at in range(longest) for unit in units if at < len(unit.prompts)]
    return [prompt for prompt in turns if room is None or len(prompt) <= room][: suite.agreement_prompts]
