"""Held-out text for perplexity and agreement, cut into windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcompress_eval.tokenizer import TextTokenizer

BUNDLED = "heldout.txt"
"""Name of the text that a model folder may bring along."""


@dataclass(frozen=True)
class HeldOutText:
    """A text and its tokens."""

    name: str
    sha256: str
    tokens: tuple[int, ...]


def find_text(text: str | Path | None, folders: Sequence[Path]) -> Path | None:
    """The file to read: the given one, else the first model folder's bundled text, else None.

    Raises:
        ValueError: the given file does not exist.
    """
    if text is not None:
        if not Path(text).is_file():
            raise ValueError(f"no text file at {text}")
        return Path(text)
    return next((folder / BUNDLED for folder in folders if (folder / BUNDLED).is_file()), None)


def read_text(path: Path, tokenizer: TextTokenizer, max_tokens: int) -> HeldOutText:
    """The first `max_tokens` tokens of a UTF-8 text file.

    Raises:
        ValueError: not UTF-8, or fewer than two tokens.
    """
    raw = path.read_bytes()
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    # A token has seldom more than 16 characters; reading on would tokenize a whole book for its first page.
    tokens = tokenizer.encode(content[: 16 * max_tokens], special=False)[:max_tokens]
    if len(tokens) < 2:
        raise ValueError(f"{path} has {len(tokens)} tokens; perplexity needs at least 2")
    return HeldOutText(path.name, hashlib.sha256(raw).hexdigest(), tuple(tokens))
