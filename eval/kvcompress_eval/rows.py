"""Result rows on disk, one JSON object per line, appended as they are made and picked up after an interruption.

A row of a task has `index`, `prompt_sha256`, `prompt_tokens`, `prediction`, `predicted_tokens`, `tokens` (the generated
token ids), `references` and `score` (0 to 1). It may have `depth`: where in the prompt the answer stands, 0 (start) to
100 (end). Rows with a depth are drawn as a heat map, one column per depth; the row's length is its unit's. A row of
a drift curve, in results.json, has `position` (first token of a bucket, counted from the end of the prompt), `tokens`,
`kl` (mean over the bucket, nats) and `top1`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class RowFile:
    """The rows of one unit of work.

    Args:
        run: fingerprint of everything the rows depend on. Rows made under another one are not reused.
        resume: whether to keep rows that are already there; otherwise the first new row replaces the file.
    """

    def __init__(self, path: Path, *, run: str, resume: bool) -> None:
        self.path = path
        self._run = run
        self._begun = False
        self.rows: list[dict[str, Any]] = _usable(path, run) if resume else []

    def append(self, row: dict[str, Any]) -> None:
        """Keep a row; it survives the process from here on."""
        self.rows.append(row)
        if self._begun:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._line(row))
            return
        # Written anew: what stands there may be another run's, or end in an interrupted line.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(self._line(kept) for kept in self.rows), "utf-8")
        self._begun = True

    def _line(self, row: dict[str, Any]) -> str:
        return json.dumps({**row, "run": self._run}, ensure_ascii=False) + "\n"


def _usable(path: Path, run: str) -> list[dict[str, Any]]:
    """Rows of this run up to the first line that is not whole."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text("utf-8").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row.pop("run", None) != run:
            return []
        rows.append(row)
    return rows
