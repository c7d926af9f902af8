"""A server that must not start: damaged checkpoints and options that a compressed cache cannot honour."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import require, tiny
from tests.e2e import vllm_engine

require.need("vllm")
pytestmark = pytest.mark.e2e


def damaged_copy(model: Path, target: Path, file: str, byte: int) -> Path:
    """A copy of a checkpoint in which one bit of one byte, counted from the file's end, is flipped."""
    shutil.copytree(model, target)
    data = bytearray((target / file).read_bytes())
    data[-byte] ^= 1
    (target / file).write_bytes(data)
    return target


def test_each_refusal_names_its_reason(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base")
    model = tiny.save_compressed(base, tmp_path / "model", tiny.mixed_spec())
    whole = str(model)
    no_manifest = Path(shutil.copytree(model, tmp_path / "no-manifest"))
    (no_manifest / "kvcompress" / "manifest.json").unlink()
    edited = Path(shutil.copytree(model, tmp_path / "edited"))
    config = (edited / "config.json").read_text()
    (edited / "config.json").write_text(
        config.replace('"max_position_embeddings": 1024', '"max_position_embeddings": 999')
    )
    other = tiny.save_compressed(
        tiny.save_model(tmp_path / "windows", sliding_window=40, layer_types=["sliding_attention"] * tiny.NUM_LAYERS),
        tmp_path / "windowed",
        tiny.mixed_spec(),
    )
    expected = [
        ({"model": str(damaged_copy(model, tmp_path / "weights", "model.safetensors", 5))}, "model.safetensors::"),
        (
            {"model": str(damaged_copy(model, tmp_path / "codec", "kvcompress/codec.safetensors", 5))},
            "kvcompress/codec.safetensors::layers.",
        ),
        ({"model": str(edited)}, "is damaged: config.json: expected"),
        ({"model": str(no_manifest)}, "has no kvcompress/manifest.json"),
        ({"model": whole, "kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"model": whole, "block_size": 24}, "--block-size 24; compressed pages need a multiple of 16, such as 32"),
        ({"model": whole, "hf_overrides": {"num_hidden_layers": 3}}, "the codec has 4 layers and the model 3"),
        ({"model": str(other)}, "model.layers.0.self_attn.attn has a codec but attends a sliding window of 40 tokens"),
    ]
    found = vllm_engine.refusals(*[attempt for attempt, _ in expected])
    for (attempt, reason), message in zip(expected, found, strict=True):
        assert reason in message, (attempt, message)
