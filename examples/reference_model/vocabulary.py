"""Train the byte-level BPE tokenizer (4,096 tokens) and encode the corpus with it.

Numbers are cut into groups of up to three digits from the left, and every such group is one token, so that a number is
copied in few and regular steps. Those 1,100 digit tokens are written by rule, the rest is learned.

    python examples/reference_model/vocabulary.py --corpus build/corpus --out build/tokenizer
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from strings import benchmark_strings
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from words import key_words, random_uuid

BOS, EOS = "<|bos|>", "<|eos|>"
VOCAB_SIZE = 4096
# The split of Llama 3: contractions, words with one leading mark, digit groups, punctuation, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A chat here is the plain concatenation of what was said: the model knows no roles.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


def splitter() -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer: regular split, then bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def digit_merges() -> list[tuple[str, str]]:
    """Merges that make every string of two or three digits one token.

    BPE applies the earliest merge first: in `abc` whichever of `ab` and `bc` comes earlier, and on a tie the left one.
    """
    pairs = [f"{n:02d}" for n in range(100)]
    merges = [(p[0], p[1]) for p in pairs]
    for n in range(1000):
        a, b, c = f"{n:03d}"
        merges.append((a + b, c) if a + b <= b + c else (a, b + c))
    return merges


def training_texts(corpus: Path, seed: int, key_count: int) -> list[str]:
    """Corpus without digits, with task keys and identifiers so that they too come out in few tokens."""
    rng = random.Random(seed)
    texts = [json.loads(line) for line in (corpus / "corpus.jsonl").read_text("utf-8").splitlines()]
    plain = []
    for page in texts:
        if not page["heldout"]:
            # Prose counts twice: words matter more than indentation to a reader of scores.
            plain += ["".join(c for c in page["text"] if not c.isdigit())] * (1 + (page["kind"] == "prose"))
    adjectives, nouns = key_words()
    keys = [f" {rng.choice(adjectives)}-{rng.choice(nouns)}" for _ in range(key_count)]
    uuids = ["".join(c for c in random_uuid(rng) if not c.isdigit()) for _ in range(key_count // 20)]
    templates = [text for part in benchmark_strings().values() for text in part.values() if isinstance(text, str)]
    return plain + keys + uuids + templates * 2000


def train(corpus: Path, seed: int, vocab_size: int = VOCAB_SIZE, keys: int = 400_000) -> Tokenizer:
    """Learn the merges on digit-free text, then put the digit tokens before them."""
    digits = digit_merges()
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = splitter()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(digits),
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(training_texts(corpus, seed, keys), trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary = sorted(learned["vocab"], key=learned["vocab"].__getitem__) + [a + b for a, b in digits]
    merges = digits + [tuple(m) for m in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=merges))
    tokenizer.pre_tokenizer = splitter()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    return with_bos(tokenizer)


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """Make every text begin with the beginning-of-text token."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def encode_corpus(tokenizer: Tokenizer, corpus: Path) -> None:
    """Write the training documents' tokens to corpus/tokens.npz: one array, document starts, and which are prose."""
    rows = [json.loads(line) for line in (corpus / "corpus.jsonl").read_text("utf-8").splitlines()]
    rows = [r for r in rows if not r["heldout"]]
    encoded = [e.ids for e in tokenizer.encode_batch([r["text"] for r in rows], add_special_tokens=False)]
    starts = np.cumsum([0] + [len(ids) for ids in encoded])
    tokens = np.fromiter((t for ids in encoded for t in ids), dtype=np.uint16, count=int(starts[-1]))
    prose = np.array([r["kind"] == "prose" for r in rows])
    np.savez(corpus / "tokens.npz", tokens=tokens, starts=starts, prose=prose)
    print(f"{len(tokens):,} training tokens, {int(prose.sum())} prose and {int((~prose).sum())} code documents")


def main() -> None:
    """Train, save in the Transformers layout, and encode the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="take this tokenizer.json instead of training one")
    args = parser.parse_args()
    tokenizer = (
        train(args.corpus, args.seed) if args.tokenizer is None else with_bos(Tokenizer.from_file(str(args.tokenizer)))
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, model_max_length=4096
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(args.out, save_jinja_files=False)
    # The class name that every version of Transformers, and servers built on it, can load.
    config_path = args.out / "tokenizer_config.json"
    config = json.loads(config_path.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config_path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    encode_corpus(tokenizer, args.corpus)


if __name__ == "__main__":
    main()
