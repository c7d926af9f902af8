"""The work of an evaluation, spelled out before any model is loaded: prompts, windows of text, and what fits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from kvcompress_eval.models import Model
from kvcompress_eval.suite import Suite
from kvcompress_eval.tasks import catalogue
from kvcompress_eval.tasks.data_files import DataSource
from kvcompress_eval.tasks.perplexity import Window, windows
from kvcompress_eval.tasks.questions import Ask
from kvcompress_eval.tasks.ruler import ModelTemplate, Sources, check_sources, generate
from kvcompress_eval.tasks.text import HeldOutText, read_texts
from kvcompress_eval.tokenizer import TextTokenizer
from kvcompress_eval.units import Progress, Skipped, Unit, fitted, other_units, ruler_units


@dataclass(frozen=True)
class Work:
    """Everything to be run on every model."""

    suite: Suite
    units: list[Unit]
    skipped: list[Skipped]
    texts: list[HeldOutText]
    windows: list[Window]
    window: int
    stride: int
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
    # Prompts come close to their length; how close is known once they are made, which takes long at such lengths.
    if suite.tasks and limit and (longest := max(suite.lengths, default=0)) > 2 * limit:
        raise ValueError(
            f"{suite.tasks[0]} at {longest} tokens does not fit models made for {limit}; choose shorter lengths"
        )
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
    units, skipped = ruler_units(ruler, tokenizer, lambda task, length: make(task, length=length), progress)
    ask = Ask(None, suite.samples, seed, tokenizer, data, chat)
    asked, not_asked = other_units(others, suite.lengths, ask, limit, progress)
    units, skipped = units + asked, skipped + not_asked
    units = [fitted(unit, limit, len(tokenizer.prefix)) for unit in units]
    window = min(suite.window, limit - 1) if limit else suite.window
    disjoint = suite.stride == suite.window
    stride = window - len(tokenizer.prefix) if disjoint else min(suite.stride, window // 2)
    texts = _texts(suite, tokenizer, text)
    cut = _windows(suite, texts, tokenizer, window, stride)
    prompts = _agreement_prompts(units, suite, limit)
    drift = _drift_prompts(suite, texts, tokenizer, limit)
    serving = _serving_prompt(units, texts, serving_context) if serving_context else []
    if serving and limit and serving_context + serving_tokens + 1 > limit:
        raise ValueError(
            f"decode speed after {serving_context} tokens does not fit a model made for {limit}; choose fewer tokens"
        )
    needs = [len(prompt) + unit.max_tokens for unit in units for prompt in unit.prompts]
    needs += [unit.questions.needs for unit in units if unit.questions is not None]
    needs += [len(prompt) + suite.drift_tokens + 1 for prompt in drift]
    needs += [len(window.tokens) + 1 for window in cut]
    needs += [len(prompt) + suite.agreement_new_tokens + 1 for prompt in prompts]
    needs += [len(serving) + serving_tokens + 1] if serving else []
    if not needs:
        reasons = "; ".join(f"{item.task} at {item.length}: {item.reason}" for item in skipped)
        raise ValueError(f"nothing to evaluate: {reasons or 'the suite is empty'}")
    return Work(
        suite=suite,
        units=units,
        skipped=skipped,
        texts=texts if cut or drift else [],
        windows=cut,
        window=window,
        stride=stride,
        agreement_prompts=prompts,
        serving_prompt=serving,
        serving_tokens=serving_tokens,
        max_context=min(max(needs), limit) if limit else max(needs),
        drift_prompts=drift,
    )


def default_cache_dir() -> Path:
    """~/.cache/kvcompress, or where XDG_CACHE_HOME points."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvcompress"


def _texts(suite: Suite, tokenizer: TextTokenizer, given: str | Path | None) -> list[HeldOutText]:
    wanted = max(suite.text_tokens, suite.drift_prompts * suite.drift_context)
    whole = suite.drift_context if suite.drift_prompts else 0
    return read_texts(given, tokenizer, wanted, each=whole) if wanted else []


def _windows(
    suite: Suite, texts: Sequence[HeldOutText], tokenizer: TextTokenizer, window: int, stride: int
) -> list[Window]:
    """Windows of every kind of text, kind by kind."""
    if not suite.text_tokens:
        return []
    each = -(-suite.text_tokens // len(texts))
    return [
        found for text in texts for found in windows(text.tokens[:each], window, stride, tokenizer.prefix, text.kind)
    ]


def _drift_prompts(
    suite: Suite, texts: Sequence[HeldOutText], tokenizer: TextTokenizer, limit: int | None
) -> list[list[int]]:
    """Beginnings of text that the baseline will continue, the kinds of text in turn."""
    if not suite.drift_prompts:
        return []
    size = suite.drift_context
    if limit and len(tokenizer.prefix) + size + suite.drift_tokens + 1 > limit:
        raise ValueError(
            f"drift over {suite.drift_tokens} tokens after {size} does not fit a model made for {limit} tokens; choose "
            "fewer with --drift-tokens"
        )
    longest = max(len(text.tokens) for text in texts)
    if longest < size:
        raise ValueError(f"{texts[0].name} has {longest} tokens; drift needs at least {size}")
    starts = [
        (text, at) for at in range(0, longest - size + 1, size) for text in texts if len(text.tokens) >= at + size
    ]
    return [[*tokenizer.prefix, *text.tokens[at : at + size]] for text, at in starts[: suite.drift_prompts]]


def _serving_prompt(units: Sequence[Unit], texts: Sequence[HeldOutText], context: int) -> list[int]:
    """A prompt of `context` tokens made of the longest prompt at hand, repeated."""
    source = max(
        [*(prompt for unit in units for prompt in unit.prompts), *(text.tokens for text in texts)], key=len, default=[1]
    )
    return (list(source) * (context // len(source) + 1))[:context]


def _agreement_prompts(units: Sequence[Unit], suite: Suite, limit: int | None) -> list[list[int]]:
    """The first prompt of every unit, then the second of every unit, and so on, as long as answers fit behind them."""
    room = limit - suite.agreement_new_tokens - 1 if limit else None
    longest = max((len(unit.prompts) for unit in units), default=0)
    turns = [unit.prompts[at] for at in range(longest) for unit in units if at < len(unit.prompts)]
    return [prompt for prompt in turns if room is None or len(prompt) <= room][: suite.agreement_prompts]
