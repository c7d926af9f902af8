"""LongBench's data sets as tasks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from typing import Any

import yaml

from kvcompress_eval.tasks import fields
from kvcompress_eval.tasks.fitting import cut_middle
from kvcompress_eval.tasks.longbench.chinese import check_jieba
from kvcompress_eval.tasks.longbench.metrics import METRICS, NEED_JIEBA
from kvcompress_eval.tasks.questions import Ask, Question, Questions, prompt_tokens
from kvcompress_eval.tasks.ruler import NotApplicableError

FIELDS: dict[str, fields.Reader] = {
    "input": fields.text,
    "context": fields.text,
    "answers": fields.texts,
    "all_classes": fields.classes,
    "length": fields.number,
}
URL = "zip://data/{name}.jsonl::hf://datasets/THUDM/LongBench/data.zip"


@dataclass(frozen=True)
class DataSet:
    """One entry of sets.yaml."""

    metric: str
    max_tokens: int
    prompt: str
    examples: bool = False
    first_line: bool = False
    even: bool = False


@cache
def data_sets() -> dict[str, DataSet]:
    """All 21, by the benchmark's names."""
    text = (files(__package__) / "sets.yaml").read_text("utf-8")
    return {name: DataSet(**entry) for name, entry in yaml.safe_load(text).items()}


def make(name: str, ask: Ask, *, even: bool = False) -> Questions:
    """The questions of one data set, or of its half of LongBench-E where `even`.

    Prompts that leave no room for the answer lose their middle. Only then does the chat template go around them.

    Raises:
        NotApplicableError: no room for the answer.
        ValueError: no file, not LongBench's format, or jieba is missing.
    """
    chosen = data_sets()[name]
    task = f"longbench_e_{name}" if even else f"longbench_{name}"
    if chosen.metric in NEED_JIEBA:
        check_jieba(task)
    file = f"{name}_e" if even else name
    records = ask.data.read(task, [f"{file}.jsonl"], URL.format(name=file), FIELDS, ask.samples)
    chat = ask.chat and not chosen.examples
    room = None
    if ask.room is not None:
        template = len(prompt_tokens(ask.tokenizer, "", chat=True)) if chat else 0
        room = ask.room - chosen.max_tokens - template
        if room < 2:
            raise NotApplicableError(f"too short: {ask.room} tokens leave no room beside {chosen.max_tokens} generated")
    items = []
    for record in records:
        prompt, was_cut = cut_middle(chosen.prompt.format(**record), ask.tokenizer, room)
        details: dict[str, Any] = {"cut": was_cut}
        if even:
            details["words"] = length_group(record["length"])
        items.append(
            Question(
                prompt_tokens(ask.tokenizer, prompt, chat=chat),
                record["answers"],
                details,
                record["all_classes"],
            )
        )
    return Questions(items, chosen.max_tokens, partial(score, chosen), split_by=("words",) if even else ())


def score(chosen: DataSet, answer: str, question: Question) -> float:
    """The best score over the references."""
    if chosen.first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    metric = METRICS[chosen.metric]
    return max((metric(answer, reference, question.classes) for reference in question.references), default=0.0)


def length_group(length: int) -> str:
    """The group of LongBench-E that a text of so many words (Chinese: characters) belongs to."""
    return "0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"
