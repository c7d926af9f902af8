"""The six tasks that need no file have the specification's bytes: 2 tokenizers, 5 lengths, 3 seeds."""

from __future__ import annotations

import json
from functools import cache

import pytest
from kvcompress_eval.tasks.ruler import OFFICIAL, NotApplicableError, generate
from kvcompress_eval.tokenizer import TextTokenizer

from tests.eval.golden import ruler as golden


@cache
def tokenizer(name: str) -> TextTokenizer:
    return TextTokenizer(golden.TOKENIZERS[name])


@pytest.mark.parametrize("case", golden.cases(), ids=golden.name)
def test_generators_give_the_golden_bytes(case: golden.Case) -> None:
    which, task, length, seed = case
    counted = tokenizer(which)
    try:
        made = generate(
            task,
            length=length,
            samples=golden.SAMPLES,
            seed=seed,
            count=counted.count,
            tokenizer_sha256=counted.sha256,
        )
        found = golden.digest(made)
    except NotApplicableError as error:
        found = str(error)[: len("too short")]
    assert found == golden.golden()[golden.name(case)]


# All of them: python -m tests.eval.golden.ruler
@pytest.mark.parametrize("case", golden.cases(seeds=[42]), ids=golden.name)
def test_the_second_implementation_gives_the_golden_bytes(case: golden.Case) -> None:
    assert golden.by_the_letter(case, tokenizer(case[0])) == golden.golden()[golden.name(case)]


def test_the_hashes_are_of_these_tokenizers_and_of_all_cases() -> None:
    kept = json.loads(golden.HASHES.read_text())
    assert kept["tokenizers"] == {name: tokenizer(name).sha256 for name in golden.TOKENIZERS}
    assert list(kept["hashes"]) == [golden.name(case) for case in golden.cases()]
    assert set(golden.TASKS) == set(OFFICIAL)
    values = list(kept["hashes"].values())
    possible = [value for value in values if value != "too short"]
    assert len(set(possible)) == len(possible), "another case, other bytes"
    for which in golden.TOKENIZERS:
        for task in golden.TASKS:
            lengths = {
                length
                for length in golden.LENGTHS
                if all(kept["hashes"][golden.name((which, task, length, seed))] != "too short" for seed in golden.SEEDS)
            }
            assert len(lengths) >= 3, f"{which} {task}: {lengths}"
