"""Scores on disk, one file per row and window, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from .measure import Scores
from .rows import Row
from .windows import Window

SOURCES = ("caches", "hadamard", "integers", "kivi", "measure", "oscar", "roster", "turboquant", "views")
"""Modules here on which scores depend."""


class Kept:
    """Scores by everything that they depend on: base model, this code, row and window."""

    def __init__(self, folder: Path, base: str) -> None:
        sources = b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in SOURCES)
        self._folder, self._base = folder, f"{base} {hashlib.sha256(sources).hexdigest()}"
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, row: Row, window: Window) -> Scores | None:
        path = self._path(row, window)
        if not path.is_file():
            return None
        with np.load(path) as found:
            return Scores(*(torch.from_numpy(found[name]) for name in ("kl", "same", "nll", "base_nll")))

    def write(self, row: Row, window: Window, scores: Scores) -> None:
        path = self._path(row, window)
        draft = path.with_suffix(".draft.npz")
        values = (scores.kl_T, scores.same_T, scores.nll_T, scores.base_nll_T)
        arrays = (value.numpy() for value in values)
        np.savez(draft, **dict(zip(("kl", "same", "nll", "base_nll"), arrays, strict=True)))
        os.replace(draft, path)

    def _path(self, row: Row, window: Window) -> Path:
        name = f"{self._base} {row.identity} {window.kind} {window.tokens}"
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.npz"
