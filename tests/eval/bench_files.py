"""Records as LongBench ships them, and files of them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from kvcompress_eval.tasks.longbench.sets import data_sets
from kvcompress_eval.tasks.ruler.prose import prose

RECORD: dict[str, Any] = {
    "input": "Where is the tower?",
    "context": "The tower is in Paris.",
    "answers": ["Paris"],
    "length": 5,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "0",
}
QUESTION: dict[str, Any] = {
    "_id": "0",
    "domain": "Single-Document QA",
    "sub_domain": "Literary",
    "difficulty": "hard",
    "length": "short",
    "question": " What is red?\n",
    "choice_A": "apple",
    "choice_B": "sky",
    "choice_C": "sea",
    "choice_D": "$DOC$",
    "answer": "A",
    "context": "\nIt costs $Q$ 5. ",
}


def write_jsonl(path: Path, *records: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


def write_json(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records, ensure_ascii=False), "utf-8")


REFERENCES = {
    "classification": "Number of something",
    "count": "7",
    "retrieval": "Paragraph 4",
    "retrieval_zh": "段落4",
    "code_similarity": "    return total",
    "qa_f1_zh": "在塔里",
    "rouge_zh": "塔在河边",
}
"""By metric; anything else is answered by a sentence of the text."""


def write_longbench(folder: Path, records: int, words: int = 500) -> None:
    """A file for every data set of LongBench, LongBench-E and LongBench v2, their texts cut from generated prose."""
    text, random = prose(200 * words).split(" "), Random(1)

    def passage() -> str:
        start = random.randrange(len(text) - words)
        return " ".join(text[start : start + words])

    for name, entry in data_sets().items():
        made = []
        for index in range(records):
            context = passage()
            reference = REFERENCES.get(entry.metric, context.split(". ")[1])
            classes = [reference, "Another kind"] if entry.metric == "classification" else None
            made.append(
                RECORD | {"context": context, "answers": [reference], "all_classes": classes, "_id": str(index)}
            )
        write_jsonl(folder / f"{name}.jsonl", *made)
        if entry.even:
            write_jsonl(
                folder / f"{name}_e.jsonl",
                *(record | {"length": 3000 + 3000 * (at % 3)} for at, record in enumerate(made)),
            )
    write_json(folder / "data.json", [QUESTION | {"context": passage(), "_id": str(index)} for index in range(records)])
