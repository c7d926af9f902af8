"""A form of cache added by `tests/toy_form` and one entry alone: plan, compress, both engines, canary and sentinel."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from kvcompress_cli import main

from kvcompress import forms
from kvcompress.methods import registry
from tests import require, tiny
from tests.e2e import reference, vllm_engine
from tests.toy_form.method import Halves

require.need("vllm")
pytestmark = pytest.mark.e2e

HALVES = forms.Form("halves", "tests.toy_form")
RECIPE = "version: 1\nstages:\n  - method: halves\n    unit: 0.5\n"


def serve(scenario: dict[str, Any]) -> dict[str, Any]:
    """In the engine's process, which starts without what the test's has changed."""
    forms.FORMS["halves"] = HALVES
    return vllm_engine.generate(scenario)


def test_a_form_is_a_folder_per_floor_and_one_entry(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(forms.FORMS, "halves", HALVES)
    monkeypatch.setitem(registry.METHODS, Halves.name, Halves())
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["kvcompress", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.run()
        assert not stop.value.code
        return capsys.readouterr().out

    planned = json.loads(run("plan", base_model, "--recipe", recipe, "--json"))["bytes_per_token"]
    assert planned["compressed"] == tiny.NUM_LAYERS * 2 * tiny.NUM_KV_HEADS * tiny.HEAD_DIM * 2
    run("compress", base_model, "--recipe", recipe, "--out", out, "--samples", 4, "--length", 64)
    run("verify", out)
    [form] = {
        layer["form"]
        for layer in json.loads((out / "config.json").read_text())["quantization_config"]["codec"]["layers"]
    }
    assert form == "halves"

    prompts, expected = reference.greedy(out, [17, 70], 16)
    served = vllm_engine.run(out, prompts, prompts, max_tokens=16, serve=serve)
    assert served["tokens"] == [expected, expected]
    assert max(served["cached"][1]) > 0
    assert f"KV cache {planned['compressed']} bytes per token" in served["log"]
    assert f"start-up canary passed in {tiny.NUM_LAYERS} layers" in served["log"]
