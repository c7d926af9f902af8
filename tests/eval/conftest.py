"""Two tokenizers trained in the process, and a tiny model with its compressed form."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
import transformers
from kvcompress_eval.tasks.ruler.strings import strings
from kvcompress_eval.tasks.ruler.words import word_list
from kvcompress_eval.tokenizer import TextTokenizer

from tests import tiny


def training_text() -> Iterator[str]:
    """Words, numbers and the benchmark's own sentences, so that prompts are of a realistic length in tokens."""
    rng = random.Random(0)
    words = [*word_list("noun"), *word_list("adjective"), *word_list("verb")]
    for _ in range(1500):
        yield " ".join(rng.choices(words, k=12)) + f" {rng.randint(0, 10**7)}."
    for family in ("niah", "vt", "cwe", "fwe"):
        yield from [strings(family).prompt, strings("niah").noise] * 20


def train_tokenizer(folder: Path, vocab_size: int, *, single_digits: bool) -> Path:
    split = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if single_digits:
        split.insert(0, tokenizers.pre_tokenizers.Digits(individual_digits=True))
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(split)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(training_text(), trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<|bos|>", eos_token="<|eos|>"
    ).save_pretrained(folder)
    return folder


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
