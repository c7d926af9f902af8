"""Model folders and command lines for the inputs that users bring."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kvcompress_cli import main

Run = Callable[..., tuple[int, str, str]]
"""A command line's arguments; gives exit code, standard output and standard error, of native code too."""


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object in a file, which is made if need be."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(found | changes))


def copy(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    return folder


def runner(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvcompress", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.run()
        captured = capfd.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


def check_refusal(code: int, stderr: str, *words: str) -> None:
    """One line that names all of `words`, exit code 2, and nothing before it but what was being done."""
    *before, last = stderr.strip().splitlines()
    assert code == 2, stderr
    assert last.startswith("error: "), stderr
    assert not [line for line in before if "hashing" in line or "Traceback" in line or "panicked" in line], stderr
    for word in words:
        assert word in last, last
