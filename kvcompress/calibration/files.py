"""A calibration file as rows: plain text, JSON lines, or one JSON list. Checked whole; of long files an even selection
is kept, so that memory and the tokenizer's time stay bounded.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kvcompress.calibration.rows import EXPECTED, Row, Text, Tokens, parse
from kvcompress.checkpoint.paths import quote

LINES, JSON = (".jsonl", ".ndjson"), ".json"
NOT_READ = {
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz", ".lz4"), "unpack it first"),
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".orc", ".avro", ".csv", ".tsv", ".xls", ".xlsx"), "write its "
    "text column as .jsonl"),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub", ".rtf"), "save it as plain text"),
    **dict.fromkeys((".npy", ".npz", ".pt", ".pth", ".bin", ".pkl", ".pickle", ".safetensors", ".gguf"), "write token "
    "ids as 'input_ids' in .jsonl"),
}  # fmt: skip
WHAT_IS_READ = "plain text, .jsonl or .json"

KEPT_CHARACTERS = 16 << 20
"""Of longer files every second, fourth, ... document is kept."""
LONGEST = 1 << 20
"""Characters of one document that are kept."""
BLOCK = 512
"""Characters of plain text, at least, between two places where a sample may start; a paragraph is kept whole."""
MAX_JSON_BYTES = 256 << 20

Progress = Callable[[int, int], None]
"""Called with the number of bytes read so far, and in all."""
_PROGRESS_ROWS = 1024


def read(source: str, vocab_size: int, progress: Progress) -> list[Row]:
    """Every row of a file, checked; see the module for which are kept.

    Args:
        source: path of a text file, a .jsonl or .ndjson file, or a .json file with a list of rows or one row. Rows are
            those of `calibration.rows`. Suffixes count in any case.

    Raises:
        ValueError: no such file, one of another kind, or a row that is none, with its line.
    """
    path = _find(source)
    suffix = path.suffix.lower()
    if suffix in NOT_READ:
        raise ValueError(f"calibration file {source} is {suffix}; {NOT_READ[suffix]}: expected {WHAT_IS_READ}")
    kept = _Kept()
    try:
        with open(path, "rb") as file:
            if suffix not in (*LINES, JSON):
                _refuse_rows(file, source)
                found: Iterator[Row] = text(file, source)
            elif suffix == JSON and not _is_lines(file):
                found = _rows(file, source, vocab_size)
            else:
                found = lines(file, source, vocab_size)
            total = file.seek(0, os.SEEK_END)
            file.seek(0)
            for number, row in enumerate(found):
                kept.add(row)
                if number % _PROGRESS_ROWS == 0:
                    progress(file.tell(), total)
            progress(total, total)
    except UnicodeDecodeError:
        raise ValueError(f"calibration file {source} is not UTF-8 text; expected {WHAT_IS_READ}, in UTF-8") from None
    except OSError as error:
        raise ValueError(f"calibration file {source} cannot be read: {error.strerror}") from error
    return kept.rows


class _Kept:
    """Every `stride`-th row, the stride doubling whenever there are too many characters."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._sizes: list[int] = []
        self._seen, self._stride, self._total = 0, 1, 0

    def add(self, row: Row) -> None:
        if self._seen % self._stride == 0:
            row, size = _shortened(row)
            self.rows.append(row)
            self._sizes.append(size)
            self._total += size
        self._seen += 1
        while self._total > KEPT_CHARACTERS and len(self.rows) > 1:
            self.rows, self._sizes = self.rows[::2], self._sizes[::2]
            self._stride, self._total = 2 * self._stride, sum(self._sizes)


def _shortened(row: Row) -> tuple[Row, int]:
    if isinstance(row, Text):
        return Text(row.where, row.text[:LONGEST]), min(LONGEST, len(row.text))
    if isinstance(row, Tokens):
        return Tokens(row.where, row.ids[:LONGEST]), min(LONGEST, len(row.ids))
    return row, sum(len(message["content"]) for message in row.messages)


def _find(source: str) -> Path:
    expected = f"expected 'builtin', 'self', or a file: {WHAT_IS_READ}"
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            raise ValueError(f"calibration source {quote(source)} is a folder; join its texts in one file: {expected}")
        found = path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, a home that is none
        raise ValueError(f"no calibration file at {quote(source)} ({error}); {expected}") from error
    if not found:
        raise ValueError(f"no calibration file at {quote(source)}; {expected}")
    return path


def text(file: BinaryIO, source: str) -> Iterator[Row]:
    """Blocks of whole paragraphs. Only a line feed ends a line: other separators are characters of the text."""
    block: list[str] = []
    size = 0
    for number, line in enumerate(_decoded(file)):
        block.append(line if number else line.removeprefix("\ufeff"))
        size += len(line)
        if (size >= BLOCK and not line.strip()) or size >= LONGEST:
            yield Text(source, "".join(block))
            block, size = [], 0
    if size:
        yield Text(source, "".join(block))


def _decoded(file: BinaryIO) -> Iterator[str]:
    """Lines with their ends; a very long one in parts."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    while raw := file.readline(LONGEST):
        yield decoder.decode(raw)
    yield decoder.decode(b"", final=True)


def lines(file: BinaryIO, source: str, vocab_size: int = 0) -> Iterator[Row]:
    """A row a line, lines ended by line feeds only."""
    for number, raw in enumerate(file, 1):
        line = raw.decode().removeprefix("\ufeff")
        if line.strip():
            where = f"{source} line {number}"
            yield parse(_json(line, where, _advice(line)), where, vocab_size)


def _advice(line: str) -> str:
    if line.strip() in ("[", "{"):
        return "expected one row a line; a file that is one JSON value is .json"
    return f"expected a string, or {EXPECTED}"


def _rows(file: BinaryIO, source: str, vocab_size: int) -> Iterator[Row]:
    raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise ValueError(
            f"calibration file {source} has over {MAX_JSON_BYTES:,} bytes; write it as .jsonl, a row a line"
        )
    if not raw.strip():
        return
    value = _json(raw.decode("utf-8-sig"), source, "expected a list of rows, or a row a line")
    if isinstance(value, dict) and isinstance(value.get("rows"), list):
        value = value["rows"]
    if not isinstance(value, list):
        yield parse(value, source, vocab_size)
        return
    for number, item in enumerate(value):
        yield parse(item, f"{source} row {number}", vocab_size)


def _json(text: str, where: str, advice: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: JSON nested too deeply; {advice}") from None
    except ValueError as error:  # a number of thousands of digits is one, too
        raise ValueError(f"{where}: not JSON ({str(error).splitlines()[0]}); {advice}") from None


def _is_lines(file: BinaryIO) -> bool:
    """Whether a .json file has a row a line, as many tools write it: at least two lines, the first whole by itself."""
    full = (raw for raw in file if raw.strip())
    first, second = next(full, b""), next(full, None)
    file.seek(0)
    return second is not None and _container(first)


def _refuse_rows(file: BinaryIO, source: str) -> None:
    """A file that is evidently JSON under another name must not be calibrated on as raw text."""
    first = next((raw for raw in file if raw.strip(b"\xef\xbb\xbf \t\r\n")), b"")
    whole = first.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"[", b"{") and _small_json(file)
    file.seek(0)
    if _container(first) or whole:
        raise ValueError(
            f"calibration file {source} holds JSON; rename it to .jsonl (a row a line) or .json (one list), so that "
            f"its rows are read: {EXPECTED}"
        )


def _small_json(file: BinaryIO) -> bool:
    file.seek(0)
    raw = file.read(MAX_JSON_BYTES + 1)
    return len(raw) <= MAX_JSON_BYTES and _container(raw)


def _container(raw: bytes) -> bool:
    """Whether this is a JSON object, or a list of objects or strings."""
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, dict | str) for item in value)
    )
