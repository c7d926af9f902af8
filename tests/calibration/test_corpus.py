from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from kvcompress.calibration import corpus


@pytest.fixture(scope="module")
def tokenizer(base_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(base_model)


def build(source: str, tokenizer: Any, **changes: Any) -> corpus.Calibration:
    options = {"samples": 6, "length": 64, "context": 1000, "seed": 0, "vocab_size": 300} | changes
    return corpus.build(source, tokenizer, **options)


def test_builtin_text(tokenizer: Any) -> None:
    found = build("builtin", tokenizer)
    assert found.tokens_NT.shape == (6, 64)
    assert (found.tokens_NT[:, 0] == tokenizer.bos_token_id).all()
    assert len(np.unique(found.tokens_NT, axis=0)) == 6
    assert (found.offsets_N[:3] == 0).all()
    assert (found.offsets_N[3:] + 64 <= 1000).all()
    assert found.offsets_N[3:].any()


def test_seed_decides(tokenizer: Any) -> None:
    assert build("builtin", tokenizer).sha256 == build("builtin", tokenizer).sha256
    assert build("builtin", tokenizer).sha256 != build("builtin", tokenizer, seed=1).sha256


def test_files(tokenizer: Any, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the cat sat on the mat " * 200)
    rows = tmp_path / "a.jsonl"
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    rows.write_text(json.dumps({"input_ids": ids}) + "\n")
    assert np.array_equal(build(str(text), tokenizer).tokens_NT, build(str(rows), tokenizer).tokens_NT)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "no calibration file"),
        ("short.txt", b"too short", "at least 63"),
        ("binary.txt", b"\xff\xfe", "not UTF-8"),
        ("bad.jsonl", b"{\n", "line 1: not JSON"),
        ("other.jsonl", b'{"body": 1}\n', "line 1: expected an object with 'text'"),
        ("range.jsonl", json.dumps({"input_ids": [999] * 100}).encode(), "outside the model's vocabulary of 300"),
    ],
)
def test_bad_sources(name: str, content: bytes | None, words: str, tokenizer: Any, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        build(str(tmp_path / name), tokenizer)
