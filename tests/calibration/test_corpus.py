from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcompress.calibration import bundled, corpus, tokenizer
from kvcompress.calibration.mixing import Stream, cut


@pytest.fixture(scope="module")
def reader(base_model: Path) -> Any:
    return tokenizer.load(base_model)


def build(source: str, reader: Any, **changes: Any) -> corpus.Calibration:
    options = {"samples": 6, "length": 64, "context": 1000, "seed": 0} | changes
    return corpus.Corpus(source, reader, 300, lambda *_: None).sample(**options)


def test_builtin_text(reader: Any) -> None:
    found = build("builtin", reader)
    assert found.tokens_NT.shape == (6, 64)
    assert (found.tokens_NT[:, 0] == reader.bos_token_id).all()
    assert len(np.unique(found.tokens_NT, axis=0)) == 6
    assert (found.offsets_N[:3] == 0).all()
    assert (found.offsets_N[3:] + 64 <= 1000).all()
    assert found.offsets_N[3:].any()


def test_seed_decides(reader: Any) -> None:
    assert build("builtin", reader).sha256 == build("builtin", reader).sha256
    assert build("builtin", reader).sha256 != build("builtin", reader, seed=1).sha256


def test_files(reader: Any, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the cat sat on the mat " * 200)
    rows = tmp_path / "a.jsonl"
    ids = reader(text.read_text(), add_special_tokens=False)["input_ids"]
    rows.write_text(json.dumps({"input_ids": ids}) + "\n")
    assert np.array_equal(build(str(text), reader).tokens_NT, build(str(rows), reader).tokens_NT)


def test_builtin_text_is_of_several_kinds() -> None:
    kinds = bundled.kinds()
    assert {"prose", "code", "dialogue", "tables", "languages", "references"} <= kinds.keys()
    assert all(len(rows) > 5 for rows in kinds.values())


@pytest.mark.parametrize(("samples", "length"), [(1, 70), (2, 512), (7, 64), (32, 512), (100, 64), (3, 4096)])
def test_every_set_of_samples_has_all_kinds_in_proportion(samples: int, length: int) -> None:
    streams = [Stream([[kind] * 97] * 80) for kind in range(7)]
    cuts = cut(streams, samples, length, np.random.Generator(np.random.PCG64(0)))
    assert [len(ids) for ids in cuts] == [length] * samples
    counts = np.bincount(np.concatenate(cuts), minlength=7)
    most = length if samples >= 7 else -(-length // -(-7 // samples))
    assert counts.min() > 0
    assert counts.max() - counts.min() <= most + samples  # lengths do not always divide evenly


def test_samples_begin_with_documents_and_spread_over_all(reader: Any) -> None:
    documents = [[1000 + number] + [0] * 49 for number in range(100)]
    cuts = cut([Stream(documents)], 20, 60, np.random.Generator(np.random.PCG64(0)))
    firsts = sorted(int(ids[0]) - 1000 for ids in cuts)
    assert min(firsts) >= 0
    assert all(5 * number - 1 <= first <= 5 * number + 6 for number, first in enumerate(firsts))


def test_short_kinds_are_filled_up_by_others() -> None:
    cuts = cut([Stream([[1] * 10]), Stream([[2] * 500])], 4, 200, np.random.Generator(np.random.PCG64(0)))
    assert [len(ids) for ids in cuts] == [200] * 4
    assert all((ids == 2).sum() >= 190 for ids in cuts)


def test_bos_of_a_text_is_not_doubled() -> None:
    cuts = cut([Stream([[7, 1, 2, 3]] * 50)], 5, 20, np.random.Generator(np.random.PCG64(0)), bos=7)
    assert all(ids[0] == 1 for ids in cuts)
