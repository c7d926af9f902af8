"""`compress` as tests call it, on little text and telling nobody, and what it wrote as hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from kvcompress import recipe as recipes
from kvcompress.methods import registry
from kvcompress.methods.context import Progress
from kvcompress.pipeline import compress as compressing
from kvcompress.pipeline.plan import Plan

OPTIONS = {"samples": 6, "length": 96}
SCALAR = "  - method: pca\n  - method: scalar\n    bits: {k: 4, v: 2}\n"
BALANCED = """\
version: 1
stages:
  - method: pca
    metric: attention
    rank: {k: 1.0, v: 0.75}
  - method: scalar
    bits: {k: 4, v: 2}
"""
"""A whole recipe."""


def listed(*stages: str) -> str:
    """Stages given as YAML fields without their braces, as a recipe lists them."""
    return "".join(f"  - {{{stage}}}\n" for stage in stages)


def recipe(stages: str = SCALAR) -> recipes.Recipe:
    return recipes.parse(f"version: 1\nstages:\n{stages}", registry.schemas())


def compress(
    model: Path, out: Path, stages: str = SCALAR, progress: Progress = lambda *_: None, **options: Any
) -> Plan:
    return compressing.compress(str(model), recipe(stages), out, compressing.Options(**OPTIONS | options), progress)


def tree_sha256(directory: Path) -> dict[str, str]:
    """Of every file, by its path in the folder."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
