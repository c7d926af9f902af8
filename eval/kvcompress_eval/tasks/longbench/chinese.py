"""Chinese words, cut by jieba, whose cuts are part of LongBench's metrics."""

from __future__ import annotations

import logging
import string
import tempfile
from functools import cache
from typing import Any

PUNCTUATION = frozenset(
    string.punctuation
    + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～"
    + "｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
"""What LongBench drops; the opening 《 is not in its list."""


def words(text: str) -> list[str]:
    """The text cut into words, in jieba's accurate mode.

    Raises:
        ValueError: jieba is not installed.
    """
    return [str(word) for word in _jieba().cut(text, cut_all=False)]


def bare(word: str) -> str:
    """The word in lower case, without punctuation and white space."""
    kept = "".join(character for character in word.lower() if character not in PUNCTUATION)
    return "".join(kept.split())


def check_jieba(task: str) -> None:
    """Refuse a task that needs jieba where there is none.

    Raises:
        ValueError: jieba is not installed.
    """
    try:
        _jieba()
    except ValueError as error:
        raise ValueError(f"{task}: {error}") from error


@cache
def _jieba() -> Any:
    try:
        import jieba
    except ImportError as error:
        raise ValueError(
            "Chinese answers are cut into words by jieba, which is not installed: pip install kvcompress[longbench]"
        ) from error
    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()
    # It would load, unchecked, whatever cache another user left in the shared temporary folder.
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.tmp_dir = folder
        tokenizer.initialize()
    return tokenizer
