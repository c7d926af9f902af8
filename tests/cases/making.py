"""Model folders for the inputs that users bring, and what a refusal of them looks like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object in a file, which is made if need be."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(found | changes))


def copy(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    return folder


def check_refusal(code: int, stderr: str, *words: str) -> None:
    """One line that names all of `words`, exit code 2, and nothing before it but what was being done."""
    *before, last = stderr.strip().splitlines()
    assert code == 2, stderr
    assert last.startswith("error: "), stderr
    assert not [line for line in before if "hashing" in line or "Traceback" in line or "panicked" in line], stderr
    for word in words:
        assert word in last, last
