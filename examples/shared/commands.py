"""Steps of an example: the command a user would type, echoed before it runs."""

from __future__ import annotations

import subprocess
import sys


def step(text: str) -> None:
    print(f"\n$ {text}", flush=True)


def kvcompress(*arguments: object, quiet: bool = False) -> str:
    """Run a kvcompress command, show it and what it prints, and stop the example if it fails."""
    words = [str(argument) for argument in arguments]
    step("kvcompress " + " ".join(words))
    done = subprocess.run(
        [sys.executable, "-m", "kvcompress_cli", *words], stdout=subprocess.PIPE, text=True, check=False
    )
    if not quiet:
        print(done.stdout, end="", flush=True)
    # 1 is a verdict (`eval` found a model worse), which is for the table to tell; anything else is a failure.
    if done.returncode not in (0, 1 if words[0] == "eval" else 0):
        sys.exit(done.returncode)
    return done.stdout
