"""The text that comes with the package: kinds of text that models are used on, a file each."""

from __future__ import annotations

from importlib import resources
from io import BytesIO

from kvcompress.calibration import files
from kvcompress.calibration.rows import Row

FOLDER = "builtin"
LINES = ".jsonl"


def kinds() -> dict[str, list[Row]]:
    """Rows by kind, in the order of the files' names."""
    folder = resources.files("kvcompress.calibration").joinpath(FOLDER)
    found: dict[str, list[Row]] = {}
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        kind, dot, suffix = entry.name.rpartition(".")
        if dot + suffix in (LINES, ".txt"):
            read = files.lines if dot + suffix == LINES else files.text
            found[kind] = list(read(BytesIO(entry.read_bytes()), entry.name))
    return found
