"""kill -9 anywhere, then resume: the same bytes as without."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

POINTS = 24


def test_killed_runs_resume_to_the_same_bytes(
    make_checkpoint: Callable[..., Path], child_environment: dict[str, str], tmp_path: Path
) -> None:
    base = make_checkpoint(shards=3)
    driver = [sys.executable, str(Path(__file__).with_name("kill_driver.py")), str(tmp_path), "5", str(POINTS)]
    done = subprocess.run(driver, env=child_environment, stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(done.stdout)
    inputs = {f"base/{path.name}" for path in base.iterdir()}
    expected = {f"out/{name}": sha256 for name, sha256 in report["reference"].items()}
    assert len(expected) == 10
    assert len(report["results"]) == POINTS
    for result in report["results"]:
        first, second, last = result["signals"]
        assert first == signal.SIGKILL, result["point"]
        assert second in (0, signal.SIGKILL)
        assert last == 0
        found = {name: sha256 for name, sha256 in result["tree"].items() if name not in inputs}
        assert found == expected, result["point"]
        assert result["left"] == ["base", "out"], result["point"]
    assert sum(result["signals"][1] == signal.SIGKILL for result in report["results"]) > POINTS // 2
