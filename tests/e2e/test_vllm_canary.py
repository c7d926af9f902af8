"""The canary and our metrics in servers of several processes. What they catch is in `test_faults.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcompress.checkpoint.manifest import Manifest
from kvcompress.serving.loading import CANARY
from tests import require
from tests.e2e import faults, forks, http_server, vllm_engine

require.need("vllm")
pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "assets" / "reference-model"
PROMPTS = [list(range(3, 203)), list(range(300, 370))]


def test_numbers_of_worker_processes_reach_the_endpoint_and_every_rank_runs_the_canary(balanced: Path) -> None:
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    found = vllm_engine.run(balanced, PROMPTS, tensor_parallel_size=2, env=env)
    assert found["log"].count("start-up canary passed in 8 layers") == 2
    assert found["kvcompress"]["kvcompress_kv_bytes_per_token"] == Manifest.load(balanced).bytes_per_token.compressed
    assert found["kvcompress"]["kvcompress_capacity_tokens"] == found["capacity_tokens"]


def test_the_server_shows_our_metrics_and_can_leave_the_canary_out(
    balanced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KVCOMPRESS_METRICS", CANARY):
        monkeypatch.delenv(name, raising=False)
    faulty = faults.FAULTS["sign of a basis vector"].plant(balanced, tmp_path / "faulty")["model"]
    options = ["--no-canary", "--enforce-eager", "--max-model-len", "1024", "--dtype", "float32"]
    env = forks.ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    env["VLLM_LOGGING_LEVEL"] = "INFO"  # other tests of this process may have set another one
    log = tmp_path / "log"
    with http_server.command(Path(faulty), log, *options, env=env) as url:
        found = http_server.metrics(url)
    assert f"no start-up canary, as {CANARY}=0 asks" in log.read_text(errors="replace")
    assert found["kvcompress_kv_bytes_per_token"] == Manifest.load(balanced).bytes_per_token.compressed
    for name in ("compression_ratio", "capacity_tokens", "sentinel_checks_total", "sentinel_failures_total"):
        assert f"kvcompress_{name}" in found
