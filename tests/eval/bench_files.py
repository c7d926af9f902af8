"""Records as LongBench ships them, and files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
