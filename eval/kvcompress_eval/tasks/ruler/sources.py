"""The local files that some tasks are made from: none of them is downloaded, and none comes with this package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

Made = TypeVar("Made")

OPTIONS = {
    "essay": ("--essay", "the essays (PaulGrahamEssays.json or a text file)"),
    "squad": ("--squad", "SQuAD 2.0's dev-v2.0.json"),
    "hotpotqa": ("--hotpotqa", "HotpotQA's hotpot_dev_distractor_v1.json"),
    "words": ("--words", "more English words (english_words.json or one word per line)"),
}
"""By name: the option that gives the file, and what it is."""


@dataclass(frozen=True)
class Sources:
    """Paths of the files, None where not given."""

    essay: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None
    words: Path | None = None

    def __post_init__(self) -> None:
        for name, (option, _) in OPTIONS.items():
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ValueError(f"no file at {path}, which {option} names")

    def path(self, name: str) -> Path:
        """The file of that name.

        Raises:
            ValueError: it was not given.
        """
        path: Path | None = getattr(self, name)
        if path is None:
            option, what = OPTIONS[name]
            raise ValueError(f"{what} must lie on disk for this task; name the file with {option}")
        return Path(path)

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        """Hashes of those files of `names` that were given."""
        given = {name: getattr(self, name) for name in names}
        return {name: sha256(Path(path)) for name, path in given.items() if path is not None}


NO_FILES = Sources()


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kept(read: Callable[[Path], Made]) -> Callable[[Path], Made]:
    """`read`, which makes something of a file once and again only when the file has other bytes."""

    @lru_cache(maxsize=4)
    def by_content(path: Path, digest: str) -> Made:
        return read(path)

    @wraps(read)
    def reading(path: Path) -> Made:
        return by_content(path, sha256(path))

    return reading


def read_text(path: Path) -> str:
    """A UTF-8 text file.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


@kept
def more_words(path: Path) -> tuple[str, ...]:
    """Words of a file: a JSON list, the values of a JSON object, or one word per line."""
    if path.suffix != ".json":
        return tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    content = read_json(path)
    words = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{path} holds no list of words; expected a JSON list of strings or an object of them")
    return tuple(words)
