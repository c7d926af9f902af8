"""LongBench's metrics against values worked out by hand from their definitions."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from kvcompress_eval.tasks.longbench import chinese, metrics
from kvcompress_eval.tasks.longbench.rouge import longest_common, rouge_l

from tests import require


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        # Case, articles and punctuation do not count: the same four words.
        ("The cat, sat on a MAT.", "cat sat on the mat", 1.0),
        # red, house of red, big, house: 2 * 2 / (2 + 3).
        ("The red house", "a red big house!", 0.8),
        # One `no` in common, three given: 2 * 1 / (3 + 1).
        ("no no no", "no", 0.5),
        # Punctuation goes first and joins what it stood between.
        ("the-cat", "cat", 0.0),
        ("the-cat", "thecat", 1.0),
        ("the a an", "the", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_qa_f1(answer: str, reference: str, expected: float) -> None:
    assert metrics.qa_f1(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        # the, cat of three words each: P = R = 2/3.
        ("the cat sat", "the cat ran", 2 / 3),
        # Words count once: P = R = 1, where counting occurrences gives P = 1/2.
        ("a a a b", "a b", 1.0),
        # Lin (2004), section 3.2: the union of w1 w2 and w1 w3 w5 is 4 of the reference's 5 words. The answer has 8
        # distinct words: P = 4/8, R = 4/5.
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 2 * 0.5 * 0.8 / 1.3),
        # The space behind the full stop is a sentence of one empty word: P = 2/3, R = 1.
        ("a b. ", "a b", 0.8),
        # The common subsequence is one word long, although both words occur: P = R = 1/2.
        ("b a", "a b", 0.5),
        ("", "a", 0.0),
        ("a", "", 0.0),
        ("...", "a", 0.0),
    ],
)
def test_rouge_l(answer: str, reference: str, expected: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(expected, abs=1e-7)


def test_of_equal_subsequences_the_one_that_keeps_the_references_last_words() -> None:
    assert longest_common(["a", "b"], ["b", "a"]) == ["b"]
    # Which is why the second sentence adds nothing here: b is in the union already. P = 1/3, R = 1/2.
    assert rouge_l("b a. b c", "a b") == pytest.approx(2 * (1 / 3) * 0.5 / (1 / 3 + 0.5))


def test_rouge_has_no_longest_sentence() -> None:
    text = " ".join(f"w{at}" for at in range(1500))
    assert rouge_l(text, text) == pytest.approx(1.0)


CLASSES = ("Food", "Animal", "Food and drink")


@pytest.mark.parametrize(
    ("answer", "reference", "classes", "expected"),
    [
        ("Animal", "Animal", CLASSES, 1.0),
        ("It is Animal or Food", "Food", CLASSES, 0.5),
        ("It is Animal or Food", "Food and drink", CLASSES, 0.0),
        # Food is part of the right class's name and is not held against the answer.
        ("Food and drink", "Food and drink", CLASSES, 1.0),
        # The longer name contains the shorter one, so both are named.
        ("Food and drink", "Food", CLASSES, 0.5),
        ("animal", "Animal", CLASSES, 0.0),
        # a goes, ab behind it is overlooked, abc is right: one of two.
        ("abc", "abc", ("a", "ab", "abc"), 0.5),
        ("", "Food", CLASSES, 0.0),
    ],
)
def test_classification(answer: str, reference: str, classes: tuple[str, ...], expected: float) -> None:
    assert metrics.classification(answer, reference, classes) == expected


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "expected"),
    [
        (metrics.count, "3 of 7 paragraphs, so 3", "3", 2 / 3),
        (metrics.count, "three", "3", 0.0),
        (metrics.count, "03", "3", 0.0),
        (metrics.count, "13", "3", 0.0),
        (metrics.retrieval, "Paragraph 12", "Paragraph 12", 1.0),
        (metrics.retrieval, "Paragraph 12 or paragraph 5", "Paragraph 12", 0.5),
        (metrics.retrieval, "Paragraph 1", "Paragraph 12", 0.0),
        (metrics.retrieval, "none", "Paragraph 12", 0.0),
        (metrics.retrieval_zh, "段落3", "段落3", 1.0),
        (metrics.retrieval_zh, "段落3、段落4和段落5", "段落3", 1 / 3),
        (metrics.retrieval_zh, "第一段", "段落1", 0.0),
    ],
)
def test_numbers(metric: Callable[[str, str], float], answer: str, reference: str, expected: float) -> None:
    assert metric(answer, reference) == pytest.approx(expected)


def test_a_reference_without_a_paragraph_is_named() -> None:
    with pytest.raises(ValueError, match="'Section 3' names no paragraph"):
        metrics.retrieval("3", "Section 3")


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        # "x = " of five characters each: 2 * 4 / 10.
        ("x = 1", "x = 2", 0.8),
        # Fences and comments are passed over; "foo(" and ")" of six characters each: 10 / 12, in whole percent.
        ("\n\n```python\n# a comment\n// another\nfoo(a)\nbar(b)", "foo(b)", 0.83),
        # An empty line behind a comment is a line.
        ("# a comment\n\nx = 1", "x = 1", 0.0),
        # Indentation counts: 2 * 1 / 4.
        ("  x", "x", 0.5),
        ("# only a comment", "x = 1", 0.0),
        ("", "x = 1", 0.0),
        # The longest common block comes first, and nothing stands on the same side of it in both: 2 * 3 / 22. Edit
        # distance would align a, b, c, d instead, 2 * 4 / 22, and 36 % is what python-Levenshtein and rapidfuzz say.
        ("pqr1a1b1c1d", "a2b2c2d2pqr", 0.27),
    ],
)
def test_code_similarity(answer: str, reference: str, expected: float) -> None:
    assert metrics.code_similarity(answer, reference) == expected


def test_chinese_metrics_with_characters_for_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chinese, "_jieba", lambda: SimpleNamespace(cut=lambda text, cut_all: iter(text)))
    # The full stop is dropped: five of five and seven characters agree, 10 / 12.
    assert metrics.qa_f1_zh("我们去公园。", "我们去公园散步") == pytest.approx(10 / 12)
    # Punctuation of both scripts, case and white space do not count.
    assert metrics.qa_f1_zh("「ABC」 ，", "abc!") == pytest.approx(1.0)
    # Here it is a word of the answer: P = 5/6, R = 5/7, F = 10/13.
    assert metrics.rouge_zh("我们去公园。", "我们去公园散步") == pytest.approx(10 / 13)


def test_chinese_metrics_with_jieba() -> None:
    require.need("jieba")
    assert chinese.words("我们去公园散步。") == ["我们", "去", "公园", "散步", "。"]
    # Three words of three and four: 6 / 7.
    assert metrics.qa_f1_zh("我们去公园。", "我们去公园散步") == pytest.approx(6 / 7)
    # P = R = 3/4, the full stop being the answer's fourth word.
    assert metrics.rouge_zh("我们去公园。", "我们去公园散步") == pytest.approx(3 / 4)
    assert metrics.rouge_zh("", "我们") == 0.0


def test_no_jieba_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch, forget: Callable[[Any], None]) -> None:
    import builtins

    load = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == "jieba":
            raise ImportError(name)
        return load(name, *args, **kwargs)  # type: ignore[arg-type]

    forget(chinese._jieba)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"longbench_vcsum: .*pip install kvcompress\[longbench\]"):
        chinese.check_jieba("longbench_vcsum")
