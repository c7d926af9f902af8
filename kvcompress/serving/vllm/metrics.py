"""Our numbers on vLLM's metrics endpoint.

They arise in worker processes and are asked for in the server's, and vLLM passes only its own from one to the other.
So every worker keeps its numbers in a small file, and the first process that loads the plug-in, which is the one that
serves the endpoint, reads the files whenever it is asked. It hands their folder on in the environment.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FOLDER = "KVCOMPRESS_METRICS"
"""Environment variable: where the workers keep their numbers."""


class Numbers:
    """What one worker has to say. Each change is on disk before the call returns.

    Args:
        worker: a name that no other worker of the server has.
        engine: which engine of the server it works for.
        bytes_per_token: of this worker's share of the cache.
        full_bytes_per_token: of that share without a codec.
        capacity_tokens: of the cache.
    """

    def __init__(
        self, worker: str, engine: int, bytes_per_token: int, full_bytes_per_token: int, capacity_tokens: int
    ) -> None:
        folder = os.environ.get(FOLDER)
        self._path = Path(folder) / f"{worker}.json" if folder else None
        sizes = {"bytes": bytes_per_token, "full_bytes": full_bytes_per_token, "capacity": capacity_tokens}
        self._values: dict[str, float] = {"engine": engine, **sizes, "checks": 0, "failures": 0}
        self._save()

    def count(self, failed: bool) -> None:
        """One more page was checked."""
        self._values["checks"] += 1
        self._values["failures"] += failed
        self._save()

    def _save(self) -> None:
        if self._path is None or not self._path.parent.is_dir():
            return
        # A reader sees the old file or the new one.
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps(self._values))
        draft.replace(self._path)


class Collector:
    """Gives the numbers of all workers to prometheus_client, added up over the workers of an engine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Any]:
        """Metric families, one sample per engine."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        engines: dict[str, list[dict[str, float]]] = {}
        for path in sorted(self._folder.glob("*.json")):
            values = json.loads(path.read_text())
            engines.setdefault(str(values["engine"]), []).append(values)
        for name, (kind, text, value) in _METRICS.items():
            family = (GaugeMetricFamily if kind == "gauge" else CounterMetricFamily)(name, text, labels=["engine"])
            for engine, workers in engines.items():
                family.add_metric([engine], value(workers))
            yield family


Workers = list[dict[str, float]]


def _total(workers: Workers, name: str) -> float:
    return sum(values[name] for values in workers)


_METRICS: dict[str, tuple[str, str, Callable[[Workers], float]]] = {
    "kvcompress_kv_bytes_per_token": (
        "gauge",
        "Bytes that one token takes in the KV cache.",
        lambda workers: _total(workers, "bytes"),
    ),
    "kvcompress_compression_ratio": (
        "gauge",
        "Bytes of one token without a codec over those with it.",
        lambda workers: _total(workers, "full_bytes") / _total(workers, "bytes"),
    ),
    "kvcompress_capacity_tokens": (
        "gauge",
        "Tokens that fit into the KV cache.",
        lambda workers: min(values["capacity"] for values in workers),
    ),
    "kvcompress_sentinel_checks": (
        "counter",
        "Pages of the KV cache that the sentinel has decoded.",
        lambda workers: _total(workers, "checks"),
    ),
    "kvcompress_sentinel_failures": (
        "counter",
        "Pages of the KV cache that did not decode to values in range.",
        lambda workers: _total(workers, "failures"),
    ),
}


def register() -> None:
    """Put the collector on the endpoint, in the first process that loads the plug-in; may be called again."""
    if FOLDER in os.environ:
        return
    from prometheus_client import REGISTRY

    folder, owner = tempfile.mkdtemp(prefix="kvcompress-metrics-"), os.getpid()
    os.environ[FOLDER] = folder
    REGISTRY.register(Collector(Path(folder)))

    @atexit.register
    def clean() -> None:
        # A forked child inherits this call, but not the folder.
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)
