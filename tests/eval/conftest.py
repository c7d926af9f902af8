"""Two tokenizers trained in the process, and a tiny model with its compressed form."""

from __future__ import annotations

from pathlib import Path

import pytest
from kvcompress_eval.tokenizer import TextTokenizer

from tests import tiny
from tests.eval.trained_tokenizer import train_tokenizer, training_text


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """1,024 tokens, digits one by one."""
    return TextTokenizer(train_tokenizer(tmp_path_factory.mktemp("small"), 1024, single_digits=True))


@pytest.fixture(scope="session")
def large_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """4,096 tokens."""
    return TextTokenizer(train_tokenizer(tmp_path_factory.mktemp("large"), 4096, single_digits=False))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of 1,024 tokens with a held-out text beside it."""
    folder = tiny.save_model(tmp_path_factory.mktemp("models") / "base", vocab_size=1024, max_position_embeddings=2048)
    train_tokenizer(folder, 1024, single_digits=True)
    (folder / "heldout.txt").write_text("\n".join(list(training_text())[:60]), "utf-8")
    return folder


@pytest.fixture(scope="session")
def compressed(base: Path) -> Path:
    """The same model with a cache of 4 bits."""
    return tiny.save_compressed(base, base.parent / "compressed", tiny.uniform_spec(4))


@pytest.fixture(scope="session")
def crushed(base: Path) -> Path:
    """The same model with a cache of 2 bits, which a random model does not survive."""
    return tiny.save_compressed(base, base.parent / "crushed", tiny.uniform_spec(2))
