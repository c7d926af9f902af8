"""Windows of held-out text: the same tokens for every cache of a comparison."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcompress_eval.tokenizer import TextTokenizer

SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one text, after whatever the tokenizer puts before a prompt."""

    kind: str
    """Name of the text's file without its ending."""
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """So many windows of so many tokens of each kind of text; of all kinds if none is named."""

    length: int
    count: int
    kinds: tuple[str, ...] = ()

    @classmethod
    def parse(cls, words: str) -> Plan:
        """From `TOKENS:COUNT` or `TOKENS:COUNT:KIND,KIND`.

        Raises:
            ValueError: it is not written so, or asks for less than one window of 8 tokens.
        """
        length, _, rest = words.partition(":")
        count, _, kinds = rest.partition(":")
        if not (length.isdigit() and count.isdigit() and int(length) >= 8 and int(count) >= 1):
            raise ValueError(f"found windows {words!r}; expected TOKENS:COUNT or TOKENS:COUNT:KIND,KIND, as 1024:2")
        return cls(int(length), int(count), tuple(kinds.split(",")) if kinds else ())

    def windows(self, files: Sequence[Path], tokenizer: TextTokenizer) -> list[Window]:
        """Raises ValueError for a kind that no file has, or a file that is too short."""
        known = [file.stem for file in files]
        if unknown := next((kind for kind in self.kinds if kind not in known), None):
            raise ValueError(f"no text of kind {unknown}; expected some of {', '.join(known)}")
        chosen = [file for file in files if not self.kinds or file.stem in self.kinds]
        return cut_windows(chosen, tokenizer, self.count, self.length)


def cut_windows(files: Sequence[Path], tokenizer: TextTokenizer, count: int, length: int) -> list[Window]:
    """`count` windows of `length` tokens of every text, spread evenly over it.

    Raises:
        ValueError: a file is not UTF-8 text, or too short for one window.
    """
    windows: list[Window] = []
    for file in files:
        prefix, tokens = tokenizer.prefix, tokenizer.encode(read_text(file, tokenizer), special=False)
        body = length - len(prefix)
        if len(tokens) < body:
            raise ValueError(f"{file} has {len(tokens)} tokens; expected at least {body} for one window of {length}")
        for start in spread(len(tokens) - body, count):
            windows.append(Window(file.stem, (*prefix, *tokens[start : start + body])))
    return windows


def read_text(file: Path, tokenizer: TextTokenizer) -> str:
    """A text as it is; the conversations of a `.jsonl` (`messages` in each line) in the model's chat template.

    Raises:
        ValueError: the file is not UTF-8 text, or a line of a `.jsonl` is no conversation.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text; expected plain text") from None
    if file.suffix != ".jsonl":
        return text
    made = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            made.append(tokenizer.conversation(json.loads(line)["messages"]))
        except (json.JSONDecodeError, KeyError, TypeError):
            expected = '{"messages": [{"role": ..., "content": ...}, ...]}'
            raise ValueError(f"{file} line {number} is no conversation; expected {expected}") from None
    return "".join(made)


def spread(room: int, count: int) -> list[int]:
    """`count` starts in `0..room`, each in the middle of its share."""
    return [room * (2 * index + 1) // (2 * count) for index in range(count)]


def text_files(given: Sequence[Path]) -> list[Path]:
    """The text files that are named, and the .txt and .jsonl files in the folders that are named.

    Raises:
        ValueError: one does not exist, a folder has no text, or two kinds have one name.
    """
    files: list[Path] = []
    for path in given:
        inside = path.iterdir() if path.is_dir() else [path]
        found = sorted(file for file in inside if file.is_file() and (file == path or file.suffix in SUFFIXES))
        if not found:
            raise ValueError(f"no text at {path}; expected a text file, or a folder with .txt or .jsonl files")
        files += found
    kinds = [file.stem for file in files]
    if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
        raise ValueError(f"two texts are named {twice}; expected different names, which tell kinds of text apart")
    return files
