"""Calibration text as token ids: the built-in mix of texts, or a user's file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kvcompress.calibration import bundled, chat, files, tokenizer
from kvcompress.calibration.mixing import Stream, cut
from kvcompress.calibration.rows import Dialogue, Row, Text, Tokens

BUILTIN = "builtin"
_AT_A_TIME = 256
"""Texts that the tokenizer gets at a time."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Calibration:
    """Token ids `[samples, length]`, the position each sample starts at, and a digest of both."""

    name: str
    tokens_NT: np.ndarray[Any, np.dtype[np.int64]]
    offsets_N: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.tokens_NT.tobytes() + self.offsets_N.tobytes()).hexdigest()


class Corpus:
    """A source's text as token ids, ready to be cut.

    Args:
        source: "builtin", or a file (`calibration.files`).
        text_tokenizer: a transformers tokenizer.
        vocab_size: rows of the model's embedding.
        progress: told how much is read, and in words what had to be given up.

    Raises:
        ValueError: the source is missing or unreadable, a row is malformed, a conversation cannot be rendered, the
            tokenizer fails, or there are ids outside the vocabulary.
    """

    def __init__(self, source: str, text_tokenizer: Any, vocab_size: int, progress: Progress) -> None:
        self.source, self._tokenizer, self._vocab_size = source, text_tokenizer, vocab_size
        self._progress = progress
        self._bos = text_tokenizer.bos_token_id
        self._dialogues = chat.Dialogues(text_tokenizer)
        self._streams = [Stream(self._encoded(rows)) for rows in self._kinds()]
        self._check()
        if self._dialogues.note:
            progress(self._dialogues.note, 1, 1)

    def sample(self, samples: int, length: int, context: int, seed: int) -> Calibration:
        """Cut `samples` sequences of `length` tokens; the same inputs give the same.

        Every sequence starts with the tokenizer's BOS where it has one, so that first-token behaviour is calibrated.
        Where they start otherwise: `place`.

        Raises:
            ValueError: there is not enough text for one sample.
        """
        begin = [] if self._bos is None else [self._bos]
        found, body = sum(map(len, self._streams)), length - len(begin)
        if found < body:
            raise ValueError(
                f"calibration source {self.source} has {found} tokens; expected at least {body} for one sample"
            )
        generator = np.random.Generator(np.random.PCG64(seed))
        cuts = cut(self._streams, samples, body, generator, self._bos)
        tokens_NT = np.stack([np.concatenate([begin, ids]).astype(np.int64) for ids in cuts])
        return place(name_of(self.source), tokens_NT, context, generator)

    def _kinds(self) -> Sequence[Sequence[Row]]:
        if self.source == BUILTIN:
            return list(bundled.kinds().values())
        return [files.read(self.source, self._vocab_size, partial(self._progress, "reading calibration text"))]

    def _encoded(self, rows: Sequence[Row]) -> Sequence[Sequence[int]]:
        """Token ids of each row; texts that do not end a line themselves are set apart by an empty one."""
        found: list[Sequence[int]] = [row.ids if isinstance(row, Tokens) else () for row in rows]
        texts = [(at, self._text(row)) for at, row in enumerate(rows) if not isinstance(row, Tokens)]
        for start in range(0, len(texts), _AT_A_TIME):
            group = texts[start : start + _AT_A_TIME]
            apart = [text if text.endswith("\n") or at == len(rows) - 1 else f"{text}\n\n" for at, text in group]
            for (at, _), ids in zip(group, tokenizer.encode(self._tokenizer, apart), strict=True):
                found[at] = ids
            self._progress("tokenizing calibration text", start + len(group), len(texts))
        return found

    def _text(self, row: Text | Dialogue) -> str:
        if isinstance(row, Text):
            return row.text
        if self.source == BUILTIN or not chat.has_template(self._tokenizer):
            return self._dialogues.render(row.messages)
        try:
            return chat.render(self._tokenizer, row.messages, tools=row.tools)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error

    def _check(self) -> None:
        """The tokenizer must be this model's, and know what it reads."""
        mine = f"the tokenizer of {self._tokenizer.name_or_path}"
        begins = f"its beginning token {self._tokenizer.bos_token!r} is"
        found = [(begins, self._bos)] if self._bos is not None else []
        found += [
            ("it gives", int(token))
            for stream in self._streams
            if len(stream)
            for token in (stream.ids.min(), stream.ids.max())
        ]
        for what, token in found:
            if not 0 <= token < self._vocab_size:
                raise ValueError(
                    f"{mine} does not fit the model: {what} id {token}, outside the model's vocabulary of "
                    f"{self._vocab_size}; get both from one place"
                )
        unknown = self._tokenizer.unk_token_id
        total = sum(map(len, self._streams))
        misses = sum(int((stream.ids == unknown).sum()) for stream in self._streams) if unknown is not None else 0
        if 2 * misses > total:
            raise ValueError(
                f"{mine} knows too little of calibration source {self.source}: {misses} of {total} tokens are "
                f"{self._tokenizer.unk_token!r}; give text of the model's kind"
            )


def place(
    name: str, tokens_NT: np.ndarray[Any, np.dtype[np.int64]], context: int, generator: np.random.Generator
) -> Calibration:
    """Samples with the positions they start at.

    The first half keeps positions from 0; the rest starts anywhere below `context`, because keys are compressed after
    RoPE and slow rotary dimensions look different late in a long context. Attention itself only sees differences of
    positions, so the model's activations do not change.
    """
    samples, length = tokens_NT.shape
    offsets_N = np.zeros(samples, dtype=np.int64)
    late = samples // 2
    if late and context > length:
        offsets_N[samples - late :] = generator.integers(0, context - length + 1, late)
    return Calibration(name, tokens_NT, offsets_N)


def name_of(source: str) -> str:
    """A source as the manifest names it: without its folder, and in characters that JSON can hold."""
    return Path(source).name.encode("utf-8", "backslashreplace").decode()
