"""Sliding-window perplexity and the held-out text it is taken over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kvcompress_eval.tasks import perplexity
from kvcompress_eval.tasks.agreement import text_rows
from kvcompress_eval.tasks.perplexity import windows
from kvcompress_eval.tasks.text import read_texts
from kvcompress_eval.tokenizer import TextTokenizer

from tests.eval.fake_engine import FakeEngine


@pytest.mark.parametrize("prefix", [(), (99,)])
@pytest.mark.parametrize(
    ("length", "window", "stride"), [(100, 16, 4), (100, 16, 15), (17, 16, 8), (5, 16, 8), (40, 8, 3)]
)
def test_every_token_is_scored_once_with_enough_context(
    length: int, window: int, stride: int, prefix: tuple[int, ...]
) -> None:
    text = list(range(length))
    scored: list[int] = []
    for item in windows(text, window, stride, prefix):
        assert len(item.tokens) <= window
        assert item.tokens[: len(prefix)] == prefix
        scored += item.tokens[-item.scored :]
        if scored[: item.scored] != list(item.tokens[-item.scored :]):
            assert item.scored <= stride
            assert len(item.tokens) == window, "later windows use all the context there is room for"
    assert scored == text[0 if prefix else 1 :]


def test_impossible_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="stride 9 does not fit a window of 8"):
        list(windows([1, 2, 3], 8, 9))
    with pytest.raises(ValueError, match="stride 8 does not fit a window of 8"):
        list(windows([1, 2, 3], 8, 8, (0,)))


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    tokens = [at % 16 for at in range(200)]
    tokens[50] = 3
    cut = list(windows(tokens, 32, 16))
    losses = [row["nll"] for row in text_rows(FakeEngine(), cut, range(len(cut)))]
    summary = perplexity.summarise(losses, seed=0)
    hit, miss = -np.log(0.9), -np.log(0.1 / 15)
    # Token 50 is unexpected, and so is 51 after it.
    assert summary["nll"] == pytest.approx((197 * hit + 2 * miss) / 199, rel=1e-5)
    assert summary["perplexity"] == pytest.approx(np.exp(summary["nll"]))
    assert summary["tokens"] == 199
    assert summary["ci95"][0] <= summary["perplexity"] <= summary["ci95"][1]


def test_increase_is_paired_by_window() -> None:
    rng = np.random.default_rng(0)
    base = [(3 + rng.normal(size=50)).tolist() for _ in range(40)]
    worse = [[loss + 0.02 for loss in window] for window in base]
    found = perplexity.summarise_increase(base, worse, seed=0)
    assert found["increase"] == pytest.approx(np.expm1(0.02))
    # The texts vary a lot from window to window, the difference not at all.
    assert found["increase_ci95"] == pytest.approx([np.expm1(0.02)] * 2)
    assert perplexity.summarise_increase(base, base, seed=0)["increase"] == 0.0


def test_a_given_text_is_read_and_cut(tmp_path: Path, small_tokenizer: TextTokenizer) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("the jalapeño was hot " * 50, "utf-8")
    [read] = read_texts(path, small_tokenizer, 30)
    assert (read.kind, read.name) == ("novel", "novel.txt")
    assert read.tokens == tuple(small_tokenizer.encode("the jalapeño was hot " * 50, special=False)[:30])


def test_the_texts_that_come_along_share_the_tokens(small_tokenizer: TextTokenizer) -> None:
    read = read_texts(None, small_tokenizer, 600)
    assert {"prose", "code", "technical", "dialogue", "tables", "languages"} <= {text.kind for text in read}
    assert {len(text.tokens) for text in read} == {-(-600 // len(read))}
    dialogue = next(text for text in read if text.kind == "dialogue")
    assert "messages" not in small_tokenizer.decode(dialogue.tokens), "conversations are read as text"
    again = read_texts(None, small_tokenizer, 600)
    assert again == read


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("missing.txt", None, "no text file at"),
        ("latin.txt", b"caf\xe9", "latin.txt is not UTF-8"),
        ("empty.txt", b"", "has 0 tokens"),
        ("image.txt", b"abc\0def" * 40, "holds zero bytes"),
        ("mark.txt", b"\xef\xbb\xbf", "has 0 tokens"),
    ],
)
def test_what_is_no_text_is_refused(
    tmp_path: Path, small_tokenizer: TextTokenizer, name: str, content: bytes | None, match: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read_texts(path, small_tokenizer, 30)
    with pytest.raises(ValueError, match="is a folder"):
        read_texts(tmp_path, small_tokenizer, 30)
