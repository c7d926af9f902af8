"""The benchmark's literal strings, read from the evaluation package's one data file."""

from functools import cache
from pathlib import Path

import yaml

STRINGS_FILE = Path(__file__).resolve().parents[2] / "eval/kvcompress_eval/tasks/ruler/strings.yaml"


@cache
def benchmark_strings() -> dict[str, dict]:
    """Templates, needle and noise lines of the RULER tasks, by task family."""
    return yaml.safe_load(STRINGS_FILE.read_text("utf-8"))
