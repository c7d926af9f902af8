"""kill -9 at random moments of `compress`, then `--resume`: the output must have the same bytes every time."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest

from kvcompress import recipe as recipes
from kvcompress.methods import registry
from kvcompress.pipeline.compress import Options, compress
from tests.compression import BALANCED, tree_sha256
from tests.e2e import forks

KILLS = 20
MOMENT = 0.02
"""Seconds."""


def _work(model: str, out: str, resume: bool, told: str) -> None:
    """One run of compress, in a process of its own; `told` grows by a byte with every word of progress."""
    import torch

    torch.set_num_threads(1)
    recipe = recipes.parse(BALANCED, registry.schemas())
    with Path(told).open("wb", buffering=0) as steps:
        options = Options(samples=8, length=128, resume=resume)
        compress(model, recipe, out, options, lambda *_: steps.write(b"."))


@pytest.mark.e2e
def test_twenty_random_kills(base_model: Path, tmp_path: Path) -> None:
    processes, told = forks.context(), tmp_path / "told"

    def steps() -> int:
        return told.stat().st_size if told.exists() else 0

    def start(out: Path, resume: bool) -> multiprocessing.process.BaseProcess:
        told.unlink(missing_ok=True)
        process = processes.Process(target=_work, args=(str(base_model), str(out), resume, str(told)))
        process.start()
        return process

    def finish(out: Path, resume: bool) -> None:
        process = start(out, resume)
        process.join(120)
        assert process.exitcode == 0

    finish(tmp_path / "whole", False)
    total = steps()
    assert total > KILLS
    expected = tree_sha256(tmp_path / "whole")
    dice, hit = random.Random(0), 0
    for attempt in range(KILLS):
        out = tmp_path / f"out-{attempt}"
        process = start(out, False)
        # One step in each twentieth of the run, so that every phase is hit, and a moment of it.
        last = total * (attempt + dice.random()) / KILLS
        while steps() < last and process.is_alive():
            time.sleep(0.001)
        time.sleep(dice.random() * MOMENT)
        process.kill()
        process.join()
        hit += process.exitcode == -signal.SIGKILL and not out.exists()
        finish(out, True)
        assert tree_sha256(out) == expected, f"kill {attempt} changed the output"
        assert not out.with_name(out.name + ".partial").exists()
    assert hit >= KILLS // 2, f"only {hit} kills came before the end; the test shows nothing"
