"""InfiniteBench's metrics for its generated tasks: 1 or 0. Facts from its compute_scores.py."""

from __future__ import annotations

import re

from kvcompress_eval.tasks.questions import Question


def first_integer(answer: str, question: Question) -> float:
    """passkey, number_string: the first run of ASCII digits is the reference, leading zeros included."""
    found = re.search("[0-9]+", answer)
    return float(found is not None and found[0] == question.references[0])


def whole_word(answer: str, question: Question) -> float:
    """kv_retrieval: the reference is one of the answer's words, `: " ' . , ? ! { }` counting as white space."""
    return float(question.references[0] in re.sub(r"""[\n:"'.,?!{}]""", " ", answer).split())


def last_word(answer: str, question: Question) -> float:
    """code_run: the last word is the reference as a whole number; ``. ` ' " :`` count as white space."""
    words = re.sub(r"""[\n.`'":]""", " ", answer).split()
    try:
        return float(int(words[-1]) == int(question.references[0]))
    except (IndexError, ValueError):
        return 0.0


def first_number(answer: str, question: Question) -> float:
    """math_find: the first number, decimals included, equals the reference. Signs are not looked at."""
    found = re.search(r"\d+\.\d+|\d+", answer)
    return float(found is not None and float(found[0]) == float(question.references[0]))
