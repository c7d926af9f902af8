"""LongBench's metrics: each scores one answer against one reference, 0 to 1.

Facts from metrics.py of THUDM/LongBench, oddities included, since published scores have them.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from kvcompress_eval.tasks.longbench.chinese import bare, words
from kvcompress_eval.tasks.longbench.rouge import rouge_l

Metric = Callable[[str, str, Sequence[str]], float]
"""Answer, reference, classes."""

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def token_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two bags of tokens."""
    same = (Counter(answer) & Counter(reference)).total()
    return 2 * same / (len(answer) + len(reference)) if same else 0.0


def qa_f1(answer: str, reference: str) -> float:
    """F1 of words: lower case, ASCII punctuation dropped, then articles."""

    def tokens(text: str) -> list[str]:
        return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()

    return token_f1(tokens(answer), tokens(reference))


def qa_f1_zh(answer: str, reference: str) -> float:
    """F1 of jieba's words, those of punctuation only left out."""

    def tokens(text: str) -> list[str]:
        return [word for word in map(bare, words(text)) if word]

    return token_f1(tokens(answer), tokens(reference))


def rouge_zh(answer: str, reference: str) -> float:
    """ROUGE-L of jieba's words."""
    return rouge_l(" ".join(words(answer)), " ".join(words(reference)))


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the answer names, if the right one is among them.

    A class whose name is part of the right one's name is not counted. The benchmark removes these from a list while
    walking it, and so overlooks the one that follows a removed one; so does this.
    """
    named = [name for name in classes if name in answer]
    at = 0
    while at < len(named):
        if named[at] in reference and named[at] != reference:
            # The first equal entry, as classes may be listed twice.
            named.remove(named[at])
        at += 1
    return 1.0 / len(named) if reference in named else 0.0


def count(answer: str, reference: str) -> float:
    """Share of the answer's whole numbers that equal the reference; 0 without any."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(answer: str, reference: str) -> float:
    """`count` of the number in `Paragraph 7`."""
    return count(answer, _number(r"Paragraph (\d+)", reference))


def retrieval_zh(answer: str, reference: str) -> float:
    """`count` of the number in `段落7`."""
    return count(answer, _number(r"段落(\d+)", reference))


def _number(pattern: str, reference: str) -> str:
    found = re.search(pattern, reference)
    if found is None:
        raise ValueError(f"the reference {reference!r} names no paragraph; expected {pattern}")
    return found[1]


def code_similarity(answer: str, reference: str) -> float:
    """Edit similarity of the answer's first line without a backtick, `#` or `//`, in whole percent.

    Leading empty lines are skipped, later ones are not, and the line is not stripped. The benchmark calls `fuzz.ratio`
    of fuzzywuzzy, which is `difflib`'s ratio, rounded, unless python-Levenshtein happens to be installed, which its
    requirements do not name. With that, or with rapidfuzz, some pairs score higher.
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


METRICS: dict[str, Metric] = {
    "qa_f1": lambda answer, reference, _: qa_f1(answer, reference),
    "qa_f1_zh": lambda answer, reference, _: qa_f1_zh(answer, reference),
    "rouge": lambda answer, reference, _: rouge_l(answer, reference),
    "rouge_zh": lambda answer, reference, _: rouge_zh(answer, reference),
    "classification": classification,
    "count": lambda answer, reference, _: count(answer, reference),
    "retrieval": lambda answer, reference, _: retrieval(answer, reference),
    "retrieval_zh": lambda answer, reference, _: retrieval_zh(answer, reference),
    "code_similarity": lambda answer, reference, _: code_similarity(answer, reference),
}
NEED_JIEBA = frozenset({"qa_f1_zh", "rouge_zh"})
