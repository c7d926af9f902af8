"""A checkpoint's tokenizer: loaded in one place, without running code beside it; what goes wrong is one sentence."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MAX_REASON = 200
MAX_IDS = 1 << 24

_ALONE = threading.RLock()


def load(model: str | Path) -> Any:
    """The transformers tokenizer of a folder or hub id.

    Never runs code of the checkpoint and never asks whether it may: a tokenizer that is only to be had that way is
    refused.

    Raises:
        ValueError: there is none, transformers cannot read it, or it has no vocabulary.
    """
    from transformers import AutoTokenizer

    _check_ids(Path(model) / "tokenizer.json")
    advice = "get its files again, or install what the library asks for; no code of the checkpoint is run"
    with one_sentence(f"{model} has no tokenizer that transformers can read", advice):
        tokenizer: Any = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
        words = tokenizer.vocab_size
    if not words:
        raise ValueError(f"the tokenizer of {model} has an empty vocabulary; get its files again")
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text. Special tokens that a text spells out count as such; none are added.

    Raises:
        ValueError: the tokenizer fails on one.
    """
    with one_sentence(f"the tokenizer of {tokenizer.name_or_path} fails on text", "get its files again"):
        found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return found


def _check_ids(path: Path) -> None:
    """Ids far apart make the tokenizers library count through all between them, for minutes."""
    try:
        found = json.loads(path.read_bytes())
        vocabulary = found["model"]["vocab"]
        ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else ())]
        ids += [token["id"] for token in found.get("added_tokens") or ()]
        highest = max(token for token in ids if type(token) is int)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return  # no such file, or one of another form: the library says what it makes of it
    if highest >= MAX_IDS:
        raise ValueError(
            f"{path} has a token with id {highest}; expected a tokenizer whose ids are below {MAX_IDS}: get it again"
        )


@contextmanager
def one_sentence(what: str, advice: str) -> Iterator[None]:
    """Makes a ValueError of whatever a tokenizer library raises, the panics of Rust code included.

    Those are no `Exception`, and print a stack trace from outside Python: while this is open, what native code writes
    to standard error is held back, and shown only if nothing failed.
    """
    with tempfile.TemporaryFile() as held, _redirected(held.fileno()):
        try:
            with in_words(what, advice):
                yield
        except ValueError:
            held.truncate(0)
            raise


@contextmanager
def in_words(what: str, advice: str) -> Iterator[None]:
    """As `one_sentence`, for any thread: standard error is left alone."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {reason(error)}; {advice}") from error


def reason(error: BaseException) -> str:
    """The first line of what a library said, with the error's name where it tells more than the words."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else ""
    said = said if len(said) <= MAX_REASON else said[:MAX_REASON] + "..."
    plain = isinstance(error, ValueError | OSError | ImportError) or type(error) is Exception
    return (said if said and plain else f"{type(error).__name__}: {said}").rstrip(".;: ")


@contextmanager
def _redirected(target: int) -> Iterator[None]:
    """Sends file descriptor 2 to a file, and what it then holds to the real one. One thread at a time."""
    with _ALONE:
        yield from _redirect(target)


def _redirect(target: int) -> Iterator[None]:
    sys.stderr.flush()
    real = os.dup(2)
    os.dup2(target, 2)
    try:
        yield
    finally:
        with suppress(ValueError, OSError):
            sys.stderr.flush()
        os.dup2(real, 2)
        size = os.fstat(target).st_size
        if size:
            os.write(2, os.pread(target, size, 0))
        os.close(real)
