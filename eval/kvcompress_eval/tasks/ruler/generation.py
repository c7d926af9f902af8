"""Generate a task's samples once and keep them on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from kvcompress.checkpoint.atomic import atomic_write
from kvcompress_eval.tasks.ruler.essay import sentence_splitter
from kvcompress_eval.tasks.ruler.registry import ruler_task
from kvcompress_eval.tasks.ruler.sample import Count, NotApplicableError, Request, Sample
from kvcompress_eval.tasks.ruler.sources import NO_FILES, OPTIONS, Sources
from kvcompress_eval.tasks.ruler.strings import strings_text
from kvcompress_eval.tasks.ruler.templates import BASE, ModelTemplate

GENERATOR_VERSION = 3
"""Raised whenever the generators would produce other bytes for the same request."""


def generate(
    name: str,
    *,
    length: int,
    samples: int,
    seed: int,
    count: Count,
    tokenizer_sha256: str,
    template: ModelTemplate = BASE,
    sources: Sources = NO_FILES,
    cache_dir: Path | None = None,
) -> list[Sample]:
    """Samples of a task. A sample does not depend on how many follow it, so a larger cached set serves a smaller one.

    Args:
        length: tokens per sample, generated ones included.
        count: tokens of a text under the tokenizer whose hash is `tokenizer_sha256`.
        template: what stands around the task's own template.
        sources: local files, for the tasks that need them.
        cache_dir: folder of generated sets; None generates afresh.

    Raises:
        NotApplicableError: impossible at this length with this tokenizer.
        ValueError: unknown task, or a file that it needs is missing or is not what it should be.
    """
    task = ruler_task(name)
    path = None
    if cache_dir is not None:
        key = cache_key(name, length, seed, tokenizer_sha256, template, sources)
        path = cache_dir / "ruler" / f"{name}-{length}-{key}.jsonl"
        kept = read_samples(path)
        if len(kept) >= samples:
            return kept[:samples]
    request = Request(length, samples, seed, count, template, sources)
    made = list(islice(task.generate(request), samples))
    assert all(sample.length <= length for sample in made), "a sample is never longer than it may be, nor cut"
    if path is not None:
        write_samples(path, made)
    return made


def side_by_side(
    make: Callable[[str, int], list[Sample]], wanted: Sequence[tuple[str, int]], threads: int
) -> Iterator[list[Sample] | NotApplicableError]:
    """`make(task, length)` for each of `wanted`, in that order, in several threads.

    Threads suffice: the tokenizer takes nearly all the time, and leaves Python's lock.
    """

    def attempt(task: str, length: int) -> list[Sample] | NotApplicableError:
        try:
            return make(task, length)
        except NotApplicableError as error:
            return error

    pool = ThreadPoolExecutor(threads)
    try:
        # The longest begin first, so that none is left to run alone at the end.
        order = sorted(range(len(wanted)), key=lambda at: -wanted[at][1])
        futures = {at: pool.submit(attempt, *wanted[at]) for at in order}
        for at in range(len(wanted)):
            yield futures[at].result()
    finally:
        pool.shutdown(cancel_futures=True)


def cache_key(
    name: str, length: int, seed: int, tokenizer_sha256: str, template: ModelTemplate, sources: Sources
) -> str:
    """Hash of everything that the bytes of a generated set depend on."""
    task = ruler_task(name)
    parts = {
        "version": GENERATOR_VERSION,
        "strings": hashlib.sha256(strings_text().encode()).hexdigest(),
        "tokenizer": tokenizer_sha256,
        "family": task.family,
        "parameters": vars(task),
        "length": length,
        "seed": seed,
        "template": [template.before, template.after],
        "files": provenance(sources, task.uses),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def provenance(sources: Sources, names: Sequence[str] = tuple(OPTIONS)) -> dict[str, str]:
    """Hashes of the given files among `names`, and how an essay's sentences were found."""
    found = sources.digests(names)
    return {**found, "sentences": sentence_splitter()[0]} if "essay" in found else found


def read_samples(path: Path) -> list[Sample]:
    """Samples of a cached set; none if there is no such file."""
    if not path.exists():
        return []
    # Texts may hold marks at which splitlines() breaks a line; JSON escapes none of them but the newline.
    rows = (json.loads(line) for line in path.read_text("utf-8").split("\n") if line)
    return [Sample(**{**row, "outputs": tuple(row["outputs"])}) for row in rows]


def write_samples(path: Path, samples: list[Sample]) -> None:
    """Write a set whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
    atomic_write(path, "".join(lines).encode())
