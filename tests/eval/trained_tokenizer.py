"""Tokenizers trained in the process, on text like the benchmarks'."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import transformers
from kvcompress_eval.tasks.ruler.strings import strings
from kvcompress_eval.tasks.ruler.words import word_list


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
