"""A method added in this file alone: command line, plan, compress and serving need no other change."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import pytest
import torch
from kvcompress_cli import main
from pydantic import Field

from kvcompress.geometry import ModelGeometry
from kvcompress.methods import registry
from kvcompress.methods.base import BasisMethod, LatentBasis
from kvcompress.recipe import Kind, StageConfig
from tests import require, tiny
from tests.e2e import reference, vllm_engine

if TYPE_CHECKING:
    from kvcompress.calibration.statistics import LayerStatistics, Moments

require.need("vllm")
pytestmark = pytest.mark.e2e

RECIPE = "version: 1\nstages:\n  - method: loudest\n    keep: 24\n  - method: scalar\n    bits: {k: 8, v: 4}\n"


class LoudestConfig(StageConfig):
    kind: ClassVar[Kind] = "basis"
    method: Literal["loudest"] = "loudest"
    keep: int = Field(32, description="channels kept per head")


class Loudest(BasisMethod[LoudestConfig]):
    """Keeps the channels of largest variance as they are."""

    name = "loudest"
    summary = "The channels of largest variance, unrotated"
    paper = "none: a test's toy"
    config = LoudestConfig

    def ranks(self, config: LoudestConfig, geometry: ModelGeometry) -> tuple[int, int]:
        return config.keep, config.keep

    def fit(self, config: LoudestConfig, statistics: LayerStatistics) -> tuple[LatentBasis, LatentBasis]:
        return _selection(statistics.keys), _selection(statistics.values)


def _selection(moments: Moments) -> LatentBasis:
    variance_HD, order_HD = moments.covariance_HDD.diagonal(dim1=-2, dim2=-1).float().sort(-1, descending=True)
    axes_HDD = torch.eye(order_HD.shape[-1])[order_HD]
    return LatentBasis(moments.mean_HD.float(), axes_HDD.mT.contiguous(), axes_HDD, variance_HD)


def test_a_method_is_one_file(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(registry.METHODS, Loudest.name, Loudest())
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["kvcompress", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.run()
        assert not stop.value.code
        return capsys.readouterr().out

    [entry] = [method for method in json.loads(run("methods", "--json")) if method["name"] == "loudest"]
    assert entry["kind"] == "basis"
    assert entry["parameters"]["properties"]["keep"]["description"] == "channels kept per head"

    planned = json.loads(run("plan", base_model, "--recipe", recipe, "--json"))["bytes_per_token"]
    per_head = (24 + 2) + (12 + 2)
    assert planned["compressed"] == tiny.NUM_LAYERS * tiny.NUM_KV_HEADS * per_head

    run("compress", base_model, "--recipe", recipe, "--out", out, "--samples", 4, "--length", 64)
    run("verify", out)
    prompts, expected = reference.greedy(out, [17, 70], 16)
    served = vllm_engine.run(out, prompts, prompts, max_tokens=16)
    assert served["tokens"] == [expected, expected]
    assert max(served["cached"][1]) > 0
    assert f"KV cache {planned['compressed']} bytes per token" in served["log"]
