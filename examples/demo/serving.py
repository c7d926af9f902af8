"""Start `kvcompress serve` on a free port of this machine, ask it something real, twice, and stop it."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

START_SECONDS = 180
BLOCK_SIZE = 32
"""Tokens per cache block; only whole blocks can be found again, so a small one shows a hit on a short prompt."""


def exercise(model: Path, log: Path) -> dict[str, Any]:
    """Serve `model`, find a needle in a long prompt, ask again and report the prefix-cache hit."""
    port = free_port()
    command = [sys.executable, "-m", "kvcompress_cli", "serve", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "demo", "--block-size", str(BLOCK_SIZE)]
    command += ["--dtype", "bfloat16", "--max-model-len", "4096", "--enforce-eager", "--enable-prompt-tokens-details"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    began = time.monotonic()
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, server, log)
            started = time.monotonic() - began
            prompt, value = needle_prompt()
            first = post(
                f"{url}/v1/completions", {"model": "demo", "prompt": prompt, "max_tokens": 32, "temperature": 0}
            )
            again = post(
                f"{url}/v1/completions", {"model": "demo", "prompt": prompt, "max_tokens": 32, "temperature": 0}
            )
            chat = post(
                f"{url}/v1/chat/completions",
                {
                    "model": "demo",
                    "messages": [{"role": "user", "content": prompt}],
                    "max_tokens": 32,
                    "temperature": 0,
                },
            )
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
    answers = [first["choices"][0]["text"], again["choices"][0]["text"]]
    if answers[0] != answers[1]:
        raise SystemExit(f"error: the same prompt was answered differently after a prefix-cache hit: {answers}")
    details = again["usage"].get("prompt_tokens_details") or {}
    return {
        "start_seconds": round(started, 1),
        "expected": value,
        "answer": answers[0].strip(),
        "chat_answer": chat["choices"][0]["message"]["content"].strip(),
        "prompt_tokens": again["usage"]["prompt_tokens"],
        "cached_tokens": details.get("cached_tokens") or 0,
    }


def needle_prompt() -> tuple[str, str]:
    """A number hidden in noise, in the benchmark's words."""
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    value = str(random.Random(7).randint(10**6, 10**7 - 1))
    lines = [noise] * 24
    lines.insert(9, f"One of the special magic numbers for quiet-harbor is: {value}.")
    head = (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    question = (
        "\nWhat is the special magic number for quiet-harbor mentioned in the provided text? "
        "The special magic number for quiet-harbor mentioned in the provided text is"
    )
    return head + "\n".join(lines) + question, value


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"error: the server stopped while starting; the end of {log}:\n{tail(log)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit(f"error: the server was not ready after {START_SECONDS} s; the end of {log}:\n{tail(log)}")


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
