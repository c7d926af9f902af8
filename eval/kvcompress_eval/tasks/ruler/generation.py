"""Generate a task's samples once and keep them on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from kvcompress.checkpoint.atomic import atomic_write
from kvcompress_eval.tasks.ruler.registry import ruler_task
from kvcompress_eval.tasks.ruler.sample import Count, Request, Sample
from kvcompress_eval.tasks.ruler.strings import strings_text

GENERATOR_VERSION = 1
"""Raised whenever the generators would produce other bytes for the same request."""


def generate(
    name: str,
    *,
    length: int,
    samples: int,
    seed: int,
    count: Count,
    tokenizer_sha256: str,
    cache_dir: Path | None = None,
) -> list[Sample]:
    """Samples of a task. A sample does not depend on how many follow it, so a larger cached set serves a smaller one.

    Args:
        length: tokens per sample, generated ones included.
        count: tokens of a text under the tokenizer whose hash is `tokenizer_sha256`.
        cache_dir: folder of generated sets; None generates afresh.

    Raises:
        NotApplicableError: impossible at this length with this tokenizer.
        ValueError: unknown task.
    """
    task = ruler_task(name)
    path = None
    if cache_dir is not None:
        path = cache_dir / "ruler" / f"{name}-{length}-{cache_key(name, length, seed, tokenizer_sha256)}.jsonl"
        kept = read_samples(path)
        if len(kept) >= samples:
            return kept[:samples]
    made = list(islice(task.generate(Request(length, samples, seed, count)), samples))
    if path is not None:
        write_samples(path, made)
    return made


def cache_key(name: str, length: int, seed: int, tokenizer_sha256: str) -> str:
    """Hash of everything that the bytes of a generated set depend on."""
    task = ruler_task(name)
    parts = {
        "version": GENERATOR_VERSION,
        "strings": hashlib.sha256(strings_text().encode()).hexdigest(),
        "tokenizer": tokenizer_sha256,
        "family": task.family,
        "parameters": asdict(task),
        "length": length,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def read_samples(path: Path) -> list[Sample]:
    """Samples of a cached set; none if there is no such file."""
    if not path.exists():
        return []
    rows = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    return [Sample(**{**row, "outputs": tuple(row["outputs"])}) for row in rows]


def write_samples(path: Path, samples: list[Sample]) -> None:
    """Write a set whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    atomic_write(path, "".join(lines).encode())
