"""Make `metaspace/tokenizer.json`: 4,096 tokens of another kind than the reference model's.

    python tests/eval/golden/tokenizer.py

It marks words as SentencePiece does, falls back to bytes for what it does not know, and joins digits; the reference
model's works on bytes and takes digits one by one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from kvcompress_eval.tasks.ruler.prose import prose
from kvcompress_eval.tasks.ruler.strings import strings
from kvcompress_eval.tasks.ruler.words import word_list
from tokenizers import decoders, models, pre_tokenizers, trainers

FOLDER = Path(__file__).parent / "metaspace"
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def training_text() -> Iterator[str]:
    rng = random.Random(0)
    words = [*word_list("noun"), *word_list("adjective"), *word_list("verb")]
    for _ in range(2000):
        yield " ".join(rng.choices(words, k=12)) + f" {rng.randint(0, 10**7)}."
    for family in ("niah", "vt", "cwe", "fwe"):
        yield from [strings(family).prompt, strings("niah").noise] * 20
    yield from prose(20_000).split("\n\n")


def main() -> None:
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=4096 - len(BYTES), special_tokens=specials, show_progress=False)
    made.train_from_iterator(training_text(), trainer)
    content = json.loads(made.to_str())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = vocab | {token: len(vocab) + at for at, token in enumerate(BYTES)}
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()
