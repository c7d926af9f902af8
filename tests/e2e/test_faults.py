"""No fault serves a wrong answer silently: hashes, the canary or the sentinel catch each one and name it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kvcompress.checkpoint.manifest import Manifest
from tests import require
from tests.e2e import faults, vllm_engine

require.need("vllm")
pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "assets" / "reference-model"
PROMPTS = [list(range(3, 203)), list(range(300, 370))]
ENGINE = {"max_tokens": 100, "max_model_len": 1024}


def test_every_fault_stops_the_server_and_is_named(balanced: Path, tmp_path: Path) -> None:
    planted = [
        vllm_engine.ENGINE | fault.plant(balanced, tmp_path / name.replace(" ", "-"))
        for name, fault in faults.FAULTS.items()
    ]
    found = vllm_engine.in_child(
        faults.attempts,
        engines=[vllm_engine.ENGINE | {"model": str(balanced)}, *planted],
        faults=["", *(fault.running for fault in faults.FAULTS.values())],
    )["errors"]
    assert found[0] == "started"
    wrong = {
        name: message
        for (name, fault), message in zip(faults.FAULTS.items(), found[1:], strict=True)
        if not re.search(fault.message, message, re.DOTALL)
    }
    assert not wrong
    assert len(planted) >= 20


def overwrite(llm: Any) -> None:
    """Every page of every layer."""
    from kvcompress.serving.vllm import compat

    for layer in compat.attention_layers(compat.Engine.of(llm.llm_engine.vllm_config)):
        layer.cache[1:] = 0xFF


def test_pages_overwritten_while_the_server_runs_are_reported(balanced: Path) -> None:
    # Several passes: the sentinel looks at a page every few hundred milliseconds.
    damaged = vllm_engine.run(balanced, *[PROMPTS] * 6, between=overwrite, **ENGINE)
    assert damaged["kvcompress"]["kvcompress_sentinel_failures_total"] > 0
    assert re.search(
        r"layer \d \(model.layers.\d.self_attn.attn\), block \d+: the page does not decode", damaged["log"]
    )


def test_a_sound_server_shows_no_failure_and_its_canary_is_quick(balanced: Path) -> None:
    sound = vllm_engine.run(balanced, PROMPTS, PROMPTS, **ENGINE)
    took = re.search(r"start-up canary passed in 8 layers, ([\d.]+) s", sound["log"])
    assert took is not None
    assert float(took[1]) < 5
    per_token = Manifest.load(balanced).bytes_per_token
    ours = sound["kvcompress"]
    # Weights are in float32 here: a channel without a codec takes four bytes.
    assert ours["kvcompress_kv_bytes_per_token"] == per_token.compressed
    assert ours["kvcompress_compression_ratio"] >= per_token.ratio
    assert ours["kvcompress_capacity_tokens"] == sound["capacity_tokens"]
    assert f"room for {sound['capacity_tokens']:,} tokens; without compression for " in sound["log"]
    assert ours["kvcompress_sentinel_checks_total"] > 0
    assert ours["kvcompress_sentinel_failures_total"] == 0
