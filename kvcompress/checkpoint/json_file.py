"""JSON in and out: bounded, one clear error on the way in; one canonical form on the way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvcompress.checkpoint.paths import quote

MAX_JSON_BYTES = 256 << 20


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse UTF-8 JSON that must be an object.

    Raises:
        ValueError: not UTF-8, not JSON (which has no NaN and no Infinity), nested too deeply, a key given twice, or
            not an object.
    """
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError(f"{where} is not usable JSON: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if isinstance(parsed, dict):
        return parsed
    raise ValueError(f"{where} holds a JSON {type(parsed).__name__}; expected an object")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most 256 MiB. Raises ValueError as `parse_object` does."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes; expected a JSON file of at most {MAX_JSON_BYTES}")
    return parse_object(path.read_bytes(), str(path))


def canonical(value: Any) -> bytes:
    """The one byte string that stands for `value` in hashes and comparisons: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def compact(value: Any) -> bytes:
    """JSON without spaces, keys in the order given, UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def pretty(value: Any) -> bytes:
    """Indented JSON with a final newline, keys in the order given; what we publish."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {quote(key)} is given twice")
        found[key] = value
    return found
