"""LongBench v2: four-way questions on long texts, answered by generation, directly or after a chain of thought.

The official scores come from text generated at temperature 0.1; here decoding is greedy, as everywhere in this suite.
lm-evaluation-harness compares the likelihoods of A to D instead, which gives other numbers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from kvcompress_eval.tasks import fields
from kvcompress_eval.tasks.fitting import cut_middle
from kvcompress_eval.tasks.questions import Ask, FollowUp, Question, Questions, prompt_tokens
from kvcompress_eval.tasks.ruler import NotApplicableError

CHOICES = ("choice_A", "choice_B", "choice_C", "choice_D")
FIELDS: dict[str, fields.Reader] = {
    **dict.fromkeys(("question", *CHOICES), fields.text),
    "answer": fields.letter,
    **dict.fromkeys(("context", "difficulty", "length"), fields.text),
}
URL = "hf://datasets/zai-org/LongBench-v2/data.json"
SPLIT_BY = ("difficulty", "words")


@dataclass(frozen=True)
class Stage:
    """A prompt and the tokens its answer may take."""

    max_tokens: int
    prompt: str

    def fill(self, record: dict[str, Any], thought: str = "") -> str:
        """The prompt with a record's parts in it, outer white space dropped from each."""
        parts = {"$DOC$": "context", "$Q$": "question"} | {f"$C_{name[-1]}$": name for name in CHOICES}
        values = {mark: str(record[name]).strip() for mark, name in parts.items()} | {"$COT$": thought.strip()}
        # One pass, so that a mark inside a text stays what it is.
        return re.sub(r"\$(DOC|Q|C_[ABCD]|COT)\$", lambda found: values[found[0]], self.prompt)


@cache
def stages() -> dict[str, Stage]:
    """direct, thought and conclusion."""
    text = (files(__package__) / "longbench2.yaml").read_text("utf-8")
    return {name: Stage(**entry) for name, entry in yaml.safe_load(text).items()}


def make(ask: Ask, *, thought: bool = False) -> Questions:
    """The questions, over-long ones without their middle.

    Args:
        thought: let the model reason first; a second prompt, without the text, then asks for the letter.

    Raises:
        NotApplicableError: no room for the answer.
        ValueError: no file, or not LongBench v2's format.
    """
    task = "longbench2_cot" if thought else "longbench2"
    records = ask.data.read(task, ["longbench2.jsonl", "data.json"], URL, FIELDS, ask.samples)
    first, last = stages()["thought" if thought else "direct"], stages()["conclusion"]
    template = len(prompt_tokens(ask.tokenizer, "", chat=True)) if ask.chat else 0

    def prompt(text: str, max_tokens: int) -> tuple[list[int], bool]:
        room = None if ask.room is None else ask.room - max_tokens - template
        if room is not None and room < 2:
            raise NotApplicableError(f"too short: {ask.room} tokens leave no room beside {max_tokens} generated")
        kept, was_cut = cut_middle(text, ask.tokenizer, room)
        return prompt_tokens(ask.tokenizer, kept, chat=ask.chat), was_cut

    items = []
    for index, record in enumerate(records):
        tokens, was_cut = prompt(first.fill(record), first.max_tokens)
        details = {"index": index, "cut": was_cut, "difficulty": record["difficulty"], "words": record["length"]}
        items.append(Question(tokens, (record["answer"],), details))
    if not thought:
        return Questions(items, first.max_tokens, score, split_by=SPLIT_BY)

    def conclude(question: Question, answer: str) -> Question:
        text = last.fill(records[question.details["index"]], answer)
        return Question(prompt(text, last.max_tokens)[0], question.references)

    bare = max(len(prompt_tokens(ask.tokenizer, last.fill(record), chat=ask.chat)) for record in records)
    # A thought that is decoded and encoded again may take other tokens; more than twice as many would be cut.
    longest = bare + 2 * first.max_tokens
    if ask.room is not None:
        longest = min(longest, ask.room - last.max_tokens)
    follow_up = FollowUp(conclude, last.max_tokens, longest, first_counts=False)
    return Questions(items, first.max_tokens, score, follow_up, SPLIT_BY)


def score(answer: str, question: Question) -> float:
    """1 where the letter is right."""
    return float(chosen_letter(answer) == question.references[0])


def chosen_letter(answer: str) -> str | None:
    """The letter in `The correct answer is (A)`, else in `The correct answer is A`; asterisks are ignored."""
    plain = answer.replace("*", "")
    for pattern in (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"):
        found = re.search(pattern, plain)
        if found:
            return found[1]
    return None
