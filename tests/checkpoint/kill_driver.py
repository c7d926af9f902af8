"""Run by test_kill.py: write a checkpoint in child processes that kill themselves at chosen points, then resume.

Usage: kill_driver.py FOLDER SEED POINTS. FOLDER holds `base`, a checkpoint with several shards. Prints JSON: the tree
of an uninterrupted run, and for each point the signals that ended its three runs and what they left.

A point is just before the n-th system call that touches the disk, so points are the same on every machine, and every
state that a kill can leave is among them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from kvcompress.checkpoint.manifest import (
    MANIFEST_FILE,
    BytesPerToken,
    Manifest,
    Parent,
    Sizes,
    fingerprint,
    is_published,
)
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.safetensors_file import TensorInfo, TensorSpec
from kvcompress.checkpoint.workdir import WorkDir, remove_published_leftover
from kvcompress.checkpoint.writer import copy_shards, copy_side_files, write_file, write_tensors

EFFECTS = {"open", "write", "truncate", "flush", "close", "fsync", "mkdir", "replace", "rename", "unlink", "rmdir"}


class Truncate:
    """Replaces the tensors of one layer, so that one shard is transformed and the others are copied."""

    def plan(self, info: TensorInfo) -> Sequence[TensorSpec] | None:
        return [TensorSpec(info.name, info.dtype, (2, info.shape[1]))] if ".2." in info.name else None

    def apply(self, name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        yield name, tensor[:2]


def compress(base: Path, out: Path, resume: bool) -> None:
    """The steps of a compression that touch the disk."""
    remove_published_leftover(out)
    checkpoint = Checkpoint.open(base)
    parent = Parent.of(checkpoint, "base")
    inputs = fingerprint({}, 0, None, parent, {})
    if resume and is_published(out, inputs):
        return
    with WorkDir.open(out, inputs, resume=resume) as work:
        digests = copy_shards(checkpoint, work, Truncate()) | copy_side_files(checkpoint, work)
        digests |= write_file(work, "config.json", b"{}")
        digests |= write_tensors(work, "kvcompress/codec.safetensors", {"layers.0.k.scale": torch.ones(4)})
        manifest = Manifest(
            parent=parent,
            recipe={},
            seed=0,
            calibration=None,
            versions={},
            bytes_per_token=BytesPerToken(base=2, compressed=1, ratio=2),
            weights_bytes=Sizes(base=1, compressed=1),
            files=digests.files,
            headers=digests.headers,
            tensors=digests.tensors,
        )
        write_file(work, MANIFEST_FILE, manifest.to_bytes())
        work.publish()


def in_child(action: Callable[[], None]) -> int:
    """Run an action in a forked child; returns the number of the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        action()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def counting_calls(action: Callable[[], None], at_call: Callable[[int], None]) -> int:
    """Run an action and tell `at_call` the number of each call in EFFECTS before it happens; returns how many."""
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        if event == "c_call" and argument.__name__ in EFFECTS:
            calls += 1
            at_call(calls)

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls


def kill_at(point: int, action: Callable[[], None]) -> Callable[[], None]:
    """An action that does not survive its `point`-th call."""

    def kill(call: int) -> None:
        if call == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        counting_calls(action, kill)

    return run


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def main(folder: Path, seed: int, points: int) -> None:
    base, out = folder / "base", folder / "out"
    start, resume = partial(compress, base, out, resume=False), partial(compress, base, out, resume=True)
    start()
    reference = tree(out)
    shutil.rmtree(out)
    total = counting_calls(start, lambda _: None)  # not the first run, which also imports modules
    # The last calls publish the output: the most delicate steps get a share of their own.
    chance, late = random.Random(seed), total - 40
    chosen = chance.sample(range(1, late), points - points // 4) + chance.sample(range(late, total + 1), points // 4)
    results = []
    for point in chosen:
        shutil.rmtree(out)
        runs = (kill_at(point, start), kill_at(point // 2 + 1, resume), resume)
        signals = [in_child(run) for run in runs]
        left = sorted(path.name for path in folder.iterdir())
        results.append({"point": point, "signals": signals, "tree": tree(folder), "left": left})
    print(json.dumps({"calls": total, "reference": reference, "results": results}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
