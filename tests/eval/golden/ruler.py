"""Golden hashes of RULER's six download-free tasks, made by the implementation in ruler_by_the_letter.py.

    python -m tests.eval.golden.ruler            # check that file against every hash (minutes)
    python -m tests.eval.golden.ruler --write    # make the hashes again

A hash covers the three first samples whole: prompts, answers, answer prefixes and lengths. Where a task cannot be made
at a length, "too short" stands in its place.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from kvcompress_eval.tasks.ruler import Sample
from kvcompress_eval.tokenizer import TextTokenizer

from tests.eval import ruler_by_the_letter as letter

HASHES = Path(__file__).with_suffix(".json")
TOKENIZERS = {
    "reference": Path(__file__).parents[3] / "assets" / "reference-model",
    "metaspace": Path(__file__).parent / "metaspace",
}
TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
LENGTHS = (1024, 2048, 4096, 6144, 8192)
SEEDS = (42, 7, 20260101)
SAMPLES = 3

Case = tuple[str, str, int, int]
"""Tokenizer, task, length, seed."""


def cases(
    tokenizers: Sequence[str] = tuple(TOKENIZERS), lengths: Sequence[int] = LENGTHS, seeds: Sequence[int] = SEEDS
) -> list[Case]:
    return list(product(tokenizers, TASKS, lengths, seeds))


def name(case: Case) -> str:
    return "/".join(map(str, case))


def digest(rows: Sequence[Sample] | list[dict[str, Any]]) -> str:
    """Hash of samples, the product's or the other implementation's."""
    plain = [{**asdict(row), "outputs": list(row.outputs)} if isinstance(row, Sample) else row for row in rows]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def by_the_letter(case: Case, tokenizer: TextTokenizer) -> str:
    """What the second implementation makes of a case."""
    _, task, length, seed = case
    try:
        return digest(letter.task(task, tokenizer.count, length, SAMPLES, seed))
    except letter.TooShort:
        return "too short"


def golden() -> dict[str, str]:
    hashes: dict[str, str] = json.loads(HASHES.read_text())["hashes"]
    return hashes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    tokenizers = {key: TextTokenizer(folder) for key, folder in TOKENIZERS.items()}
    made = {name(case): by_the_letter(case, tokenizers[case[0]]) for case in cases()}
    if write:
        hashed = {key: tokenizer.sha256 for key, tokenizer in tokenizers.items()}
        HASHES.write_text(json.dumps({"tokenizers": hashed, "samples": SAMPLES, "hashes": made}, indent=1) + "\n")
    kept = golden()
    differing = [case for case in made if made[case] != kept.get(case)]
    print(
        f"{len(made)} cases, {sum(value == 'too short' for value in made.values())} too short, {len(differing)} differ"
    )
    raise SystemExit("\n".join(differing) if differing else 0)


if __name__ == "__main__":
    main()
