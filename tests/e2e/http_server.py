"""An OpenAI server on a free port of this machine, and requests to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.e2e import forks, vllm_engine

START_SECONDS = 240
STOP_SECONDS = 30


@contextmanager
def forked(model: Path, log: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[str]:
    """The server in a process forked from one that has imported vLLM. Yields its address."""
    port = _free_port()
    arguments = ["--model", str(model), *_address(port), *options]
    with tempfile.TemporaryDirectory() as folder:
        process = forks.context().Process(target=_serve, args=(arguments, env or {}, log, folder))
        process.start()
        try:
            yield _when_ready(port, log, process.is_alive)
        finally:
            process.terminate()
            process.join(STOP_SECONDS)
            if process.is_alive():
                process.kill()


@contextmanager
def command(model: Path, log: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[str]:
    """The server as a user starts it: `kvcompress serve`. Yields its address."""
    port = _free_port()
    words = [sys.executable, "-m", "kvcompress_cli", "serve", str(model), *_address(port), *options]
    with open(log, "wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=os.environ | (env or {}))
    try:
        yield _when_ready(port, log, lambda: process.poll() is None)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def post(url: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=180) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def complete(url: str, model: str, prompt: list[int], tokens: int) -> dict[str, Any]:
    """The server's greedy continuation of a prompt by so many tokens, with their ids."""
    return post(
        f"{url}/v1/completions",
        model=model,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        ignore_eos=True,
        return_token_ids=True,
    )


def metrics(url: str) -> dict[str, float]:
    """The server's counters and gauges by name, summed over labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            name = name.split("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def _address(port: int) -> list[str]:
    return ["--host", "127.0.0.1", "--port", str(port)]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _when_ready(port: int, log: Path, lives: Callable[[], bool]) -> str:
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    while lives() and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return url
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"the server did not start; it wrote:\n{log.read_text(errors='replace')[-5000:]}")


def _serve(arguments: list[str], env: dict[str, str], log: Path, folder: str) -> None:
    """In the child: never returns before the server is told to stop."""
    vllm_engine.redirect(log)
    # A forked process ends without the calls that would remove its temporary files.
    tempfile.tempdir = folder
    vllm_engine.fork_workers()
    os.environ.update(env)
    sys.argv = ["server", *arguments]
    from vllm.entrypoints.launchers.api_server.entry import main

    main()
