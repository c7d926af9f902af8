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


def _work(model: str, out: str, resume: bool, begun: str) -> None:
    """One run of compress, in a process of its own; touches `begun` once its imports are done."""
    import torch

    torch.set_num_threads(1)
    Path(begun).touch()
    recipe = recipes.parse(BALANCED, registry.schemas())
    compress(model, recipe, out, Options(samples=8, length=128, resume=resume), lambda *_: None)


@pytest.mark.e2e
def test_twenty_random_kills(base_model: Path, tmp_path: Path) -> None:
    processes = forks.context()

    def start(out: Path, resume: bool) -> multiprocessing.process.BaseProcess:
        """A run that is past its imports."""
        begun = tmp_path / f"begun-{time.monotonic_ns()}"
        process = processes.Process(target=_work, args=(str(base_model), str(out), resume, str(begun)))
        process.start()
        while not begun.exists():
            assert process.is_alive() or begun.exists(), "the run ended before it began"
            time.sleep(0.001)
        return process

    def finish(out: Path, resume: bool) -> float:
        """Run to the end; seconds it took."""
        process = start(out, resume)
        began = time.monotonic()
        process.join(120)
        assert process.exitcode == 0
        return time.monotonic() - began

    finish(tmp_path / "warm-up", False)
    seconds = finish(tmp_path / "whole", False)
    expected = tree_sha256(tmp_path / "whole")
    dice, hit = random.Random(0), 0
    for attempt in range(KILLS):
        out = tmp_path / f"out-{attempt}"
        process = start(out, False)
        # One moment in each twentieth of the run, so that every phase is hit.
        time.sleep(seconds * (attempt + dice.random()) / KILLS)
        process.kill()
        process.join()
        hit += process.exitcode == -signal.SIGKILL and not out.exists()
        finish(out, True)
        assert tree_sha256(out) == expected, f"kill {attempt} changed the output"
        assert not out.with_name(out.name + ".partial").exists()
    assert hit >= KILLS // 2, f"only {hit} kills came before the end; the test shows nothing"
