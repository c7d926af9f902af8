"""What the fields of a data set's records may hold: each reader gives the value as the tasks want it, or refuses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Reader = Callable[[Any], Any]
"""Of a value. Raises ValueError with what was found and what is expected."""


def text(value: Any) -> str:
    """A string."""
    if isinstance(value, str):
        return value
    raise _refused(value, "a string")


def texts(value: Any) -> tuple[str, ...]:
    """One string or several; whole numbers are read as their digits."""
    items = value if isinstance(value, list) else [value]
    if items and all(isinstance(item, str) or type(item) is int for item in items):
        return tuple(map(str, items))
    raise _refused(value, "a string, or a list of at least one")


def classes(value: Any) -> tuple[str, ...]:
    """A list of strings, or null for none."""
    return () if value is None or value == [] else texts(value)


def number(value: Any) -> int:
    """A whole number."""
    if type(value) is int:
        return value
    raise _refused(value, "a whole number")


def letter(value: Any) -> str:
    """A, B, C or D."""
    if isinstance(value, str) and value.strip() in ("A", "B", "C", "D"):
        return value.strip()
    raise _refused(value, "A, B, C or D")


def _refused(value: Any, expected: str) -> ValueError:
    found = json.dumps(value, ensure_ascii=False)
    return ValueError(f"found {found if len(found) <= 60 else found[:60] + '...'}; expected {expected}")
