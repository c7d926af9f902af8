"""Ask a served model something real, twice: the answer, and how much of it came from the prefix cache."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from examples.shared.server import serving

BLOCK_SIZE = 32
"""Tokens per cache block; only whole blocks can be found again, so a small one shows a hit on a short prompt."""


def exercise(model: Path, log: Path) -> dict[str, Any]:
    """Serve `model`, find a needle in a long prompt, ask again and report the prefix-cache hit."""
    with serving(model, log, "--block-size", BLOCK_SIZE, "--enable-prompt-tokens-details") as server:
        prompt, value = needle_prompt()
        first = server.complete(prompt, max_tokens=32)
        again = server.complete(prompt, max_tokens=32)
        chat = server.chat(prompt, max_tokens=32)
    answers = [first["choices"][0]["text"], again["choices"][0]["text"]]
    if answers[0] != answers[1]:
        raise SystemExit(f"error: the same prompt was answered differently after a prefix-cache hit: {answers}")
    details = again["usage"].get("prompt_tokens_details") or {}
    return {
        "start_seconds": server.start_seconds,
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
