"""Held-out text for perplexity and agreement: several kinds of it come with the package, a file each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from kvcompress_eval.tokenizer import TextTokenizer

SHIPPED = "heldout"
"""Folder of this package. A `.txt` is read as it is; a `.jsonl` holds conversations, `messages` in each line."""

CHARACTERS_PER_TOKEN = 16
"""A token has seldom more; reading on would tokenize a whole book for its first page."""


@dataclass(frozen=True)
class HeldOutText:
    """The beginning of one kind of text, as tokens."""

    kind: str
    name: str
    sha256: str
    tokens: tuple[int, ...]


def read_texts(given: str | Path | None, tokenizer: TextTokenizer, max_tokens: int, each: int = 0) -> list[HeldOutText]:
    """The given text, else every kind that the package brings: `max_tokens` tokens in all, as many of each kind.

    Args:
        each: tokens to read of every kind at least.

    Raises:
        ValueError: the given file cannot be read, is no text, or has fewer than two tokens.
    """
    sources = dict(_shipped()) if given is None else {Path(given).stem: (Path(given).name, _bytes(Path(given)))}
    each = max(each, -(-max_tokens // len(sources)))
    return [
        HeldOutText(kind, name, hashlib.sha256(raw).hexdigest(), _tokens(raw, name, tokenizer, each))
        for kind, (name, raw) in sources.items()
    ]


def _shipped() -> Iterator[tuple[str, tuple[str, bytes]]]:
    folder = files("kvcompress_eval") / SHIPPED
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        kind, _, suffix = entry.name.rpartition(".")
        if kind != "README" and suffix in ("txt", "jsonl"):
            yield kind, (entry.name, entry.read_bytes())


def _bytes(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"--text: {path} is a folder; expected a UTF-8 text file")
    if not path.is_file():
        raise ValueError(f"--text: no text file at {path}")
    return path.read_bytes()


def _tokens(raw: bytes, name: str, tokenizer: TextTokenizer, most: int) -> tuple[int, ...]:
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from error
    if "\0" in content:
        raise ValueError(f"{name} holds zero bytes; expected a UTF-8 text file")
    wanted = CHARACTERS_PER_TOKEN * most
    text = _conversations(content, tokenizer, wanted) if name.endswith(".jsonl") else content[:wanted]
    tokens = tokenizer.encode(text, special=False)[:most]
    # A chat template writes the token that begins a sequence itself; every window begins with it anyway.
    if tokenizer.prefix and tokens[: len(tokenizer.prefix)] == tokenizer.prefix:
        tokens = tokens[len(tokenizer.prefix) :]
    if len(tokens) < 2:
        raise ValueError(f"{name} has {len(tokens)} tokens; perplexity needs at least 2")
    return tuple(tokens)


def _conversations(content: str, tokenizer: TextTokenizer, characters: int) -> str:
    """Conversations one after the other, each in the model's chat template if it has one."""
    made: list[str] = []
    for line in content.split("\n"):
        if line.strip() and sum(map(len, made)) < characters:
            made.append(tokenizer.conversation(json.loads(line)["messages"]))
    return "".join(made)
