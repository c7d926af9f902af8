"""Calibration on text that the model writes itself, through `compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcompress.methods.context import Progress
from kvcompress.pipeline import compress as pipeline
from kvcompress.pipeline import self_text
from kvcompress.pipeline.compress import Options
from tests import quantize
from tests.compression import recipe, tree_sha256


def compress(model: Path, out: Path, progress: Progress = lambda *_: None, **options: Any) -> None:
    chosen = Options(calibration="self", samples=5, length=40, **options)
    pipeline.compress(str(model), recipe(), out, chosen, progress)


def test_killed_and_resumed_gives_the_same_bytes(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_text, "BATCH", 2)
    compress(base_model, tmp_path / "whole")
    steps: list[int] = []

    def killed(step: str, done: int, total: int) -> None:
        if step == self_text.STEP:
            steps.append(done)
            if done > 100:  # in the second batch
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(base_model, tmp_path / "out", progress=killed)
    again: list[int] = []

    def watched(step: str, done: int, total: int) -> None:
        if step == self_text.STEP:
            again.append(done)

    compress(base_model, tmp_path / "out", progress=watched, resume=True)
    assert min(again) == 82  # the first batch was kept
    assert tree_sha256(tmp_path / "out") == tree_sha256(tmp_path / "whole")


def test_quantized_weights_are_refused_before_any_work(base_model: Path, tmp_path: Path) -> None:
    base = quantize.save(base_model, tmp_path / "int8", quantize.int8, quantize.int8_config())
    with pytest.raises(ValueError, match="quantized weights"):
        compress(base, tmp_path / "out", progress=lambda step, *_: pytest.fail(step))
    assert not (tmp_path / "out.partial").exists()
