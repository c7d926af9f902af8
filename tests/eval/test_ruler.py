"""The RULER generators: byte for byte what the specification says, cached, and honest about what cannot be made."""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from kvcompress_eval.tasks.ruler import (
    OFFICIAL,
    TASKS,
    NotApplicableError,
    Request,
    Sample,
    generate,
    ruler_task,
    score,
    task_score,
)
from kvcompress_eval.tasks.ruler.vt import Vt
from kvcompress_eval.tasks.ruler.words import WordKeys, word_keys, word_pool
from kvcompress_eval.tokenizer import TextTokenizer

from tests.eval import ruler_by_the_letter as letter

SAMPLES = 3


def digest(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def plain(samples: list[Sample]) -> list[dict[str, Any]]:
    return [{**asdict(sample), "outputs": list(sample.outputs)} for sample in samples]


def make(name: str, tokenizer: TextTokenizer, length: int, seed: int = 42, samples: int = SAMPLES) -> list[Sample]:
    return generate(
        name,
        length=length,
        samples=samples,
        seed=seed,
        count=tokenizer.count,
        tokenizer_sha256=tokenizer.sha256,
    )


@pytest.mark.parametrize("seed", [42, 7, 20260101])
@pytest.mark.parametrize("length", [1024, 2048, 4096])
@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_tasks_equal_the_second_implementation(
    name: str, size: str, length: int, seed: int, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(f"{size}_tokenizer")
    made = plain(make(name, tokenizer, length, seed))
    assert digest(made) == digest(letter.task(name, tokenizer.count, length, SAMPLES, seed))


@pytest.mark.parametrize("name", sorted(set(TASKS) - set(OFFICIAL)))
def test_variants_equal_the_second_implementation(name: str, large_tokenizer: TextTokenizer) -> None:
    made = plain(make(name, large_tokenizer, 1024))
    assert digest(made) == digest(letter.task(name, large_tokenizer.count, 1024, SAMPLES, 42))


# Digests of three samples under a counter that needs no trained tokenizer: they must never change.
GOLDEN = {
    "niah_single_1": "f4e058c8da26162ecaeb350087e1439862ba4b24319ce10a5201be2c18f89ffc",
    "niah_multikey_2": "e5bb56ce2883bbb3ef0084c6c0744f5340180e77f03f2b8e45bf81ec6d4d7804",
    "niah_multikey_3": "13898cb6e8c22c8da6dd67e6795ea4f73f3d8a6e07806412ba29b4a05c6ad90c",
    "vt": "6feffd49710b02b8ccc2de4aa606049bf9d63ab3deb3b53b29f78efcdacd0b94",
    "cwe": "fe707111c4590949f2c4bd926f89b910822fffe4e18d050c05470f1295ad9a25",
    "fwe": "4d13b620138ed22d3f32c4f390289a38d58caa36a36f7b5227848c90d4dd3301",
}


def count_pieces(text: str) -> int:
    """Pieces of up to four letters or digits, and every other mark: near to what a real tokenizer counts."""
    return len(re.findall(r"\w{1,4}|[^\w\s]|\n", text))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_digests(name: str) -> None:
    made = generate(name, length=2048, samples=3, seed=42, count=count_pieces, tokenizer_sha256="pieces")
    assert digest(plain(made)) == GOLDEN[name]


@pytest.mark.parametrize("name", TASKS)
def test_every_sample_fits_and_holds_its_answers(name: str, large_tokenizer: TextTokenizer) -> None:
    task = ruler_task(name)
    for sample in make(name, large_tokenizer, 2048, samples=5):
        assert sample.length == large_tokenizer.count(sample.prompt) + task.tokens_to_generate <= 2048
        assert all(answer in sample.input for answer in sample.outputs)
        assert sample.answer_prefix.startswith((" The speci", " Answer: A", " Answer: T"))


def test_numbers_of_needles_and_queries(large_tokenizer: TextTokenizer) -> None:
    needle = "One of the special magic numbers for "
    multivalue = make("niah_noise_multivalue", large_tokenizer, 1024)[0]
    assert multivalue.input.count(needle) == 4 == len(multivalue.outputs)
    assert "What are all the special magic numbers for" in multivalue.input
    multikey = make("niah_noise_multikey", large_tokenizer, 1024)[0]
    assert multikey.input.count(needle) == 4
    assert len(multikey.outputs) == 1
    assert "What is the special magic number for" in multikey.input
    multiquery = make("niah_noise_multiquery", large_tokenizer, 1024)[0]
    assert re.search(r"numbers for \S+, \S+, \S+, and \S+ mentioned", multiquery.input)
    assert len(make("vt_2hop", large_tokenizer, 1024)[0].outputs) == 3
    assert len(make("vt", large_tokenizer, 1024)[0].outputs) == 5


def test_word_keys_are_the_sorted_set() -> None:
    expected = letter.all_keys()
    keys = word_keys()
    assert len(keys) == len(expected) == 6_171_620
    assert (keys[0], keys[-1]) == ("Early-ATM", "zonked-zucchini") == (expected[0], expected[-1])
    rng = random.Random(0)
    picks = [rng.randrange(len(expected)) for _ in range(20_000)]
    assert [keys[at] for at in picks] == [expected[at] for at in picks]
    assert len(word_pool()) == 8_166


def test_word_keys_merge_adjectives_that_begin_alike() -> None:
    adjectives = ["blue", "blue-eyed", "blu", "ad", "ad hoc", "blue-eyed-y"]
    nouns = ["a", "eyed-z", "eyed", "z", "eyez"]
    keys = WordKeys(adjectives, nouns)
    expected = sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    assert list(keys) == expected == keys[:]
    with pytest.raises(IndexError):
        keys[len(expected)]


@pytest.mark.parametrize(
    ("name", "length", "reason"),
    [
        ("niah_single_1", 140, "too short"),
        ("niah_noise_multiquery", 300, "too short"),
        ("vt", 512, "too short"),
        ("fwe", 200, "too short"),
        ("cwe", 512, "too short"),
        ("cwe", 262144, "too long"),
    ],
)
def test_impossible_lengths_are_named(name: str, length: int, reason: str) -> None:
    with pytest.raises(NotApplicableError, match=reason):
        generate(name, length=length, samples=1, seed=1, count=count_pieces, tokenizer_sha256="pieces")


def test_chains_longer_than_the_smallest_haystack_are_named() -> None:
    with pytest.raises(NotApplicableError, match="9 assignments need as many lines, 5 fit"):
        next(Vt(hops=8).generate(Request(1024, 1, 1, count_pieces)))


def test_unknown_task_lists_the_known() -> None:
    with pytest.raises(ValueError, match="niah_single_1"):
        ruler_task("niah_single_9")


def test_cache_serves_smaller_sets_and_grows(tmp_path: Path) -> None:
    calls = 0

    def count(text: str) -> int:
        nonlocal calls
        calls += 1
        return count_pieces(text)

    def get(samples: int, seed: int = 1, tokenizer: str = "a") -> list[Sample]:
        return generate(
            "niah_single_1",
            length=512,
            samples=samples,
            seed=seed,
            count=count,
            tokenizer_sha256=tokenizer,
            cache_dir=tmp_path,
        )

    first = get(4)
    after = calls
    assert get(4) == first
    assert get(2) == first[:2]
    assert calls == after, "cached sets are not generated again"
    assert get(6)[:4] == first
    assert calls > after
    assert get(4, seed=2) != first
    before = calls
    get(4, tokenizer="b")
    assert calls > before, "another tokenizer is another set"
    assert not list(tmp_path.rglob("*.tmp"))


def test_score_is_the_share_of_references_found() -> None:
    assert score("it is 123 and ABC.", ["123", "abc"]) == 1.0
    assert score("only 123", ["123", "456", "789", "000"]) == 0.25
    assert score("", ["x"]) == 0.0
    assert score("a\x00b", ["a\nb"]) == 1.0, "control characters are newlines"
    assert score("  padded \t", ["padded"]) == 1.0
    assert task_score([1.0, 0.5, 0.0]) == 50.0
    assert task_score([1.0, 1.0, 0.0]) == 66.67


def test_tokenizer_counts_what_tokenize_returns(small_tokenizer: TextTokenizer) -> None:
    text = make("niah_single_1", small_tokenizer, 1024, samples=1)[0].prompt
    assert small_tokenizer.count(text) == len(small_tokenizer._tokenizer.tokenize(text))
    assert small_tokenizer.encode(text) == [0, *small_tokenizer.encode(text, special=False)]
    assert small_tokenizer.prefix == [0]
    assert small_tokenizer.decode(small_tokenizer.encode(text)) == text


def test_missing_tokenizer_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        TextTokenizer(tmp_path)
