"""Start `kvcompress serve` on a free port of this machine, ask it something, and stop it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 300
NAME = "example"
"""What requests call the model."""


@dataclass(frozen=True)
class Server:
    url: str
    start_seconds: float

    def complete(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        """The most probable continuation of a prompt, as the server's whole answer."""
        return self._post("completions", {"prompt": prompt, "max_tokens": max_tokens})

    def chat(self, message: str, max_tokens: int) -> dict[str, Any]:
        """The most probable answer to a user's message, as the server's whole answer."""
        return self._post(
            "chat/completions", {"messages": [{"role": "user", "content": message}], "max_tokens": max_tokens}
        )

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        content = json.dumps(body | {"model": NAME, "temperature": 0}).encode()
        request = urllib.request.Request(f"{self.url}/v1/{path}", content, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=180) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


@contextmanager
def serving(model: Path, log: Path, *options: object) -> Iterator[Server]:
    """A server of `model` that is ready, stopped on leaving; what it says goes to `log`.

    Args:
        options: of `vllm serve`, besides those for a small machine.
    """
    port = _free_port()
    command = [sys.executable, "-m", "kvcompress_cli", "serve", str(model), "--port", str(port), "--host", "127.0.0.1"]
    command += ["--served-model-name", NAME, "--dtype", "bfloat16", "--max-model-len", "4096", "--enforce-eager"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    began = time.monotonic()
    with open(log, "w") as output:
        server = subprocess.Popen(
            [*command, *map(str, options)], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, server, log)
            yield Server(url, round(time.monotonic() - began, 1))
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"error: the server stopped while starting; the end of {log}:\n{_tail(log)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit(f"error: the server was not ready after {START_SECONDS} s; the end of {log}:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
