"""A server that must not start although every hash agrees, and one that notices what happens to its cache."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from kvcompress import recipe as recipes
from kvcompress.checkpoint.digests import tensor_key
from kvcompress.checkpoint.manifest import MANIFEST_FILE, Manifest
from kvcompress.checkpoint.safetensors_file import load_tensors, save_tensors
from kvcompress.checkpoint.verify import CODEC_FILE, verify
from kvcompress.methods import registry
from kvcompress.pipeline import compress as compressing
from kvcompress.serving.loading import CANARY
from tests.e2e import vllm_engine

pytest.importorskip("vllm")
pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "assets" / "reference-model"
PROMPTS = [list(range(3, 203)), list(range(300, 370))]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("canary") / "balanced"
    recipe = recipes.load(ROOT / "examples" / "recipes" / "balanced.yaml", registry.schemas())
    options = compressing.Options(samples=8, length=256)
    compressing.compress(str(MODEL), recipe, out, options, lambda *_: None)
    return out


def rewritten(model: Path, target: Path, change: Callable[[Tensors], None]) -> str:
    """A copy with other codec tensors whose hashes were made again: nothing that `verify` could notice."""
    shutil.copytree(model, target)
    tensors = load_tensors(target / CODEC_FILE)
    change(tensors)
    saved = save_tensors(target / CODEC_FILE, tensors)
    manifest = Manifest.load(target)
    manifest.tensors |= {tensor_key(CODEC_FILE, name): sha256 for name, sha256 in saved.tensors.items()}
    manifest.headers[CODEC_FILE] = saved.header_sha256
    (target / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    assert verify(target).ok
    return str(target)


def scales_reversed(tensors: Tensors) -> None:
    tensors["layers.4.v.scale"] = tensors["layers.4.v.scale"].flip(-1).contiguous()


def swapped(tensors: Tensors) -> None:
    """The first two layers whose tensors have the same shapes."""
    names = ["k.mean", "k.basis", "k.inverse", "k.scale", "v.mean", "v.basis", "v.inverse", "v.scale"]
    shapes: dict[Any, int] = {}
    for index in range(8):
        shape = tuple(tensors[f"layers.{index}.{name}"].shape for name in names)
        if shape in shapes:
            for name in names:
                one, other = f"layers.{shapes[shape]}.{name}", f"layers.{index}.{name}"
                tensors[one], tensors[other] = tensors[other], tensors[one]
            return
        shapes[shape] = index
    raise AssertionError("no two layers are alike")


def sign_flipped(tensors: Tensors) -> None:
    tensors["layers.5.k.basis"][1, :, 3] *= -1


def gain_overflow(tensors: Tensors) -> None:
    tensors["layers.2.k.scale"] *= 1e-7


def test_faults_that_no_hash_can_show_stop_the_server(balanced: Path, tmp_path: Path) -> None:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}
    expected: list[tuple[dict[str, Any], str]] = [
        ({"model": str(balanced)}, "started"),
        (
            {"model": rewritten(balanced, tmp_path / "scale", scales_reversed)},
            r"canary stops the server: layer 4 \(model.layers.4.self_attn.attn\) loses .* of its values in KV head 0",
        ),
        ({"model": rewritten(balanced, tmp_path / "swapped", swapped)}, r"layer \d \(.*\) loses .* its codec states"),
        (
            {"model": rewritten(balanced, tmp_path / "sign", sign_flipped)},
            r"layer 5 \(.*\) loses .* of its keys in KV head 1",
        ),
        ({"model": rewritten(balanced, tmp_path / "gain", gain_overflow)}, r"layer 2 \(.*\) loses .* of its keys"),
        (
            {"model": str(balanced), "hf_overrides": rope},
            r"layer 0 \(.*\) computes other keys than its codec was made for .* rotary positions",
        ),
    ]
    found = vllm_engine.refusals(*[attempt for attempt, _ in expected])
    for (attempt, pattern), message in zip(expected, found, strict=True):
        assert re.search(pattern, message), (attempt, message)


def overwrite(llm: Any) -> None:
    """Every page of every layer."""
    from kvcompress.serving.vllm import compat

    for layer in compat.attention_layers(llm.llm_engine.vllm_config):
        layer.kv_cache[1:] = 0xFF


def test_the_canary_is_quick_and_the_sentinel_reports_an_overwritten_cache(balanced: Path) -> None:
    engine = {"max_tokens": 100, "max_model_len": 1024}
    sound = vllm_engine.run(balanced, PROMPTS, PROMPTS, **engine)
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
    damaged = vllm_engine.run(balanced, PROMPTS, PROMPTS, between=overwrite, **engine)
    assert damaged["kvcompress"]["kvcompress_sentinel_failures_total"] > 0
    assert re.search(
        r"layer \d \(model.layers.\d.self_attn.attn\), block \d+: the page does not decode", damaged["log"]
    )


def test_numbers_of_worker_processes_reach_the_endpoint_and_every_rank_runs_the_canary(balanced: Path) -> None:
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    found = vllm_engine.run(balanced, PROMPTS, tensor_parallel_size=2, env=env)
    assert found["log"].count("start-up canary passed in 8 layers") == 2
    assert found["kvcompress"]["kvcompress_kv_bytes_per_token"] == Manifest.load(balanced).bytes_per_token.compressed
    assert found["kvcompress"]["kvcompress_capacity_tokens"] == found["capacity_tokens"]


def test_the_server_shows_our_metrics_and_can_leave_the_canary_out(balanced: Path, tmp_path: Path) -> None:
    faulty = rewritten(balanced, tmp_path / "faulty", sign_flipped)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "kvcompress_cli", "serve", faulty, "--no-canary", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--enforce-eager", "--max-model-len", "1024", "--dtype", "float32"]
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "cli", "eval"))
    env = os.environ | vllm_engine.ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": paths}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    for name in ("KVCOMPRESS_METRICS", CANARY):
        env.pop(name, None)
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=env, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
    try:
        text = _metrics(f"http://127.0.0.1:{port}/metrics", server, log)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    assert f"no start-up canary, as {CANARY}=0 asks" in log.read_text(errors="replace")
    stored = Manifest.load(balanced).bytes_per_token.compressed
    assert f'kvcompress_kv_bytes_per_token{{engine="0"}} {float(stored)}' in text
    for name in ("compression_ratio", "capacity_tokens", "sentinel_checks_total", "sentinel_failures_total"):
        assert f"kvcompress_{name}{{" in text


def _metrics(url: str, server: subprocess.Popen[bytes], log: Path) -> str:
    """What the endpoint says once the server is up."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(log.read_text(errors="replace")[-5000:])
