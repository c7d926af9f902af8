"""How long RULER's prompts take to make: 13 tasks at 5 lengths, 100 samples each, nothing cached.

    python benchmarks/ruler_speed.py [--model assets/reference-model] [--threads 2] [--keep]

Essays and questions come from small invented files, so every task runs under its own name. A task that cannot be made
at a length is counted apart, with the time that finding out took. `--keep` writes the figures to benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from functools import partial
from pathlib import Path

from kvcompress_eval.environment import environment
from kvcompress_eval.tasks.ruler import ALL, NotApplicableError, generate, side_by_side
from kvcompress_eval.tokenizer import TextTokenizer
from rich.console import Console
from rich.table import Table
from ruler_files import write_sources

ROOT = Path(__file__).resolve().parents[1]

LENGTHS = (512, 1024, 2048, 4096, 8192)
SAMPLES = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "assets" / "reference-model"), help="whose tokenizer counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--machine", default="cpu", help="short name of the machine, e.g. epyc-2core")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    tokenizer = TextTokenizer(options.model)
    spent: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        make = partial(
            generate,
            samples=SAMPLES,
            seed=42,
            count=tokenizer.count,
            tokenizer_sha256=tokenizer.sha256,
            sources=write_sources(Path(folder)),
        )

        def timed(task: str, length: int) -> list:
            begun = time.thread_time()
            try:
                return make(task, length=length)
            finally:
                spent[task, length] = time.thread_time() - begun

        wanted = [(task, length) for length in LENGTHS for task in ALL]
        begun, cpu = time.perf_counter(), time.process_time()
        made = dict(zip(wanted, side_by_side(timed, wanted, options.threads), strict=True))
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu

    short = [item for item, samples in made.items() if isinstance(samples, NotApplicableError)]
    table = Table("task", *map(str, LENGTHS), title="CPU seconds (x: too short for the task)")
    for task in ALL:
        cells = [f"{spent[task, length]:.2f}{' x' if (task, length) in short else ''}" for length in LENGTHS]
        table.add_row(task, *cells)
    Console().print(table)
    samples = SAMPLES * (len(wanted) - len(short))
    tokens = sum(sample.length for sets in made.values() if isinstance(sets, list) for sample in sets)
    print(
        f"{len(wanted)} sets, {len(short)} too short; {samples} samples of {tokens / 1e6:.1f} million tokens "
        f"in {wall:.1f} s on {options.threads} threads ({cpu:.1f} s of CPU)"
    )
    if options.keep:
        figures = {
            "what": "RULER prompts, nothing cached",
            "environment": environment(),
            "tokenizer": Path(options.model).name,
            "threads": options.threads,
            "wall_s": wall,
            "cpu_s": cpu,
            "samples": samples,
            "tokens": tokens,
            "too_short": [f"{task} at {length}" for task, length in short],
            "cpu_s_by_set": {f"{task} at {length}": value for (task, length), value in sorted(spent.items())},
        }
        path = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-{options.machine}-ruler-speed.json"
        path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
