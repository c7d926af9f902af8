"""ROUGE-L as the package `rouge` 1.0.1 defines it, which is what LongBench's published scores are made of.

Summary level: texts are cut into sentences at full stops; every reference sentence is aligned with every sentence of
the answer, the words of all longest common subsequences are united, and precision and recall are shares of *distinct*
words. `rouge-score`, Google's package, counts occurrences instead and gives other numbers.

One difference: the package walks the alignment recursively and fails where two sentences have together more words than
Python's recursion limit, which LongBench scores 0. Here such sentences are scored.
"""

from __future__ import annotations

from collections.abc import Sequence

EPSILON = 1e-8
"""Added by the package to the denominator of F."""


def rouge_l(prediction: str, reference: str) -> float:
    """F of ROUGE-L, 0 to 1; 0 where either text has no sentence."""
    answer, expected = sentences(prediction), sentences(reference)
    if not answer or not expected:
        return 0.0
    common: set[str] = set()
    for wanted in expected:
        for given in answer:
            common.update(longest_common(wanted, given))
    recall = len(common) / len({word for sentence in expected for word in sentence})
    precision = len(common) / len({word for sentence in answer for word in sentence})
    return 2 * precision * recall / (precision + recall + EPSILON)


def sentences(text: str) -> list[list[str]]:
    """Words of each sentence. White space between two full stops is a sentence of one empty word."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def longest_common(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """A longest common subsequence. Of several, the one found from the end by dropping the second's words first."""
    table = [[0] * (len(second) + 1)]
    for word in first:
        above, row = table[-1], [0]
        for at, other in enumerate(second):
            row.append(above[at] + 1 if word == other else max(above[at + 1], row[at]))
        table.append(row)
    found: list[str] = []
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            found.append(first[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]
