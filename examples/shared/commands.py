"""Steps of an example: the command a user would type, echoed before it runs."""

from __future__ import annotations

import os
import subprocess
import sys


def step(text: str) -> None:
    print(f"\n$ {text}", flush=True)


def kvcompress(*arguments: object, quiet: bool = False, threads: int | None = None) -> str:
    """Run a kvcompress command, show it and what it prints, and stop the example if it fails.

    Args:
        threads: to compute with, where several commands share the machine; the environment's if not given.
    """
    words = [str(argument) for argument in arguments]
    step("kvcompress " + " ".join(words))
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    command = [sys.executable, "-m", "kvcompress_cli", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if not quiet:
        print(done.stdout, end="", flush=True)
    # 1 is a verdict (`eval` found a model worse), which is for the table to tell; anything else is a failure.
    if done.returncode not in (0, 1 if words[0] == "eval" else 0):
        sys.exit(done.returncode)
    return done.stdout
