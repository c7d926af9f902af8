"""Unfinished training on disk: what is needed to go on with exactly the bytes an uninterrupted run would give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvcompress.checkpoint.hashing import sha256_file
from kvcompress.checkpoint.safetensors_file import load_tensors, save_tensors
from kvcompress.checkpoint.workdir import WorkDir

if TYPE_CHECKING:
    from torch import Tensor


class StateFile:
    """Tensors of a run after some step, in scratch, under a journal unit that holds the step and the file's sha256.

    Every state has a file of its own, and the one before it is removed only when the journal names the new one: a kill
    at any moment leaves a state that can be used. `inputs` names the data; a state made from other data is ignored.
    """

    def __init__(self, work: WorkDir, unit: str, inputs: str) -> None:
        self._work, self._unit, self._inputs = work, unit, inputs

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """Steps done and the tensors after them; None to start from the beginning."""
        if not self._work.done(self._unit):
            return None
        record = self._work.data(self._unit)
        path = self._work.scratch(record["file"])
        if record["inputs"] != self._inputs or not path.is_file() or sha256_file(path) != record["sha256"]:
            return None
        return int(record["step"]), load_tensors(path)

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        before = self._work.data(self._unit)["file"] if self._work.done(self._unit) else None
        name = f"{self._unit.replace(':', '-')}-{step:06d}.safetensors"
        saved = save_tensors(self._work.scratch(name), tensors)
        record = {"file": name, "sha256": saved.sha256, "step": step, "inputs": self._inputs}
        self._work.commit(self._unit, {}, record)
        if before not in (None, name):
            self._work.scratch(before).unlink(missing_ok=True)
