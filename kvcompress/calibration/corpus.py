"""Calibration text as token ids: the built-in text, a text file, or jsonl with a `text` or `input_ids` field."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

BUILTIN = "builtin"


@dataclass(frozen=True)
class Calibration:
    """Token ids `[samples, length]`, the position each sample starts at, and a digest of both."""

    name: str
    tokens_NT: np.ndarray[Any, np.dtype[np.int64]]
    offsets_N: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.tokens_NT.tobytes() + self.offsets_N.tobytes()).hexdigest()


def build(
    source: str, tokenizer: Any, samples: int, length: int, context: int, seed: int, vocab_size: int
) -> Calibration:
    """Cut `samples` sequences of `length` tokens out of a source.

    Every sequence starts with the tokenizer's BOS where it has one, so that first-token behaviour is calibrated. The
    first half keeps positions from 0; the rest starts anywhere below `context`, because keys are compressed after
    RoPE and slow rotary dimensions look different late in a long context. Attention itself only sees differences of
    positions, so the model's activations do not change.

    Args:
        source: "builtin", a text file, or a .jsonl file.
        tokenizer: a transformers tokenizer.
        seed: chooses the cuts and the offsets; the same inputs give the same tokens.

    Raises:
        ValueError: the source is missing, unreadable, too short, or has ids outside the vocabulary.
    """
    stream = _token_stream(source, tokenizer)
    bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    body = length - len(bos)
    if len(stream) < body:
        raise ValueError(
            f"calibration source {source} has {len(stream)} tokens; expected at least {body} for one sample"
        )
    if int(stream.max()) >= vocab_size or int(stream.min()) < 0:
        raise ValueError(f"calibration source {source} has token ids outside the model's vocabulary of {vocab_size}")
    generator = np.random.Generator(np.random.PCG64(seed))
    # Spread the cuts over the whole text, each anywhere inside its own stretch.
    room = len(stream) - body + 1
    edges = np.linspace(0, room, samples + 1).astype(np.int64)
    starts = [int(generator.integers(low, max(low + 1, high))) for low, high in itertools.pairwise(edges.tolist())]
    tokens = np.stack([np.concatenate([bos, stream[start : start + body]]).astype(np.int64) for start in starts])
    offsets = np.zeros(samples, dtype=np.int64)
    late = samples // 2
    if late and context > length:
        offsets[samples - late :] = generator.integers(0, context - length + 1, late)
    return Calibration(Path(source).name, tokens, offsets)


def _token_stream(source: str, tokenizer: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    ids: list[int] = []
    for piece in _pieces(source):
        ids.extend(piece if isinstance(piece, list) else tokenizer(piece, add_special_tokens=False)["input_ids"])
    return np.asarray(ids, dtype=np.int64)


def _pieces(source: str) -> Iterator[str | list[int]]:
    if source == BUILTIN:
        yield resources.files("kvcompress.calibration").joinpath("builtin.txt").read_text(encoding="utf-8")
        return
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"no calibration file at {source}; expected 'builtin', a text file or a .jsonl file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"calibration file {source} is not UTF-8 text; expected plain text or .jsonl") from None
    if path.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _jsonl_piece(line, f"{source} line {number}")


def _jsonl_piece(line: str, where: str) -> str | list[int]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        raise ValueError(f"{where}: not JSON; expected an object with 'text' or 'input_ids'") from None
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row, dict) and isinstance(row.get("input_ids"), list):
        return [int(token) for token in row["input_ids"]]
    raise ValueError(f"{where}: expected an object with 'text' (string) or 'input_ids' (list of token ids)")
