"""Put the demo's figures into the repository: a dated result file, and the table in README.md made from it.

make demo && .venv/bin/python examples/demo/publish.py demo/results.json
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from kvcompress_eval.report import markdown_table

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of the demo")
    parser.add_argument("--date", required=True, help="day of the run, YYYY-MM-DD")
    parser.add_argument("--machine", required=True, help="short name of the machine, e.g. epyc-2core")
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    for model in results["models"]:
        model["path"] = model["name"]  # where the folders lay on that machine says nothing to a reader
    kept = ROOT / "benchmarks" / "results" / f"{options.date}-{options.machine}-demo.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(results, indent=1) + "\n")
    readme = ROOT / "README.md"
    text = readme.read_text()
    block = f"{BEGIN}\n{section(results, options.date, options.machine, kept.relative_to(ROOT))}\n{END}"
    updated, count = re.subn(f"{BEGIN}.*{END}", lambda _: block, text, flags=re.DOTALL)
    assert count == 1, "README.md has lost its markers"
    readme.write_text(updated)
    print(f"{kept.relative_to(ROOT)} and README.md written")


def section(results: dict[str, Any], date: str, machine: str, kept: Path) -> str:
    """The README's results: one table and the sentence that says what it is."""
    names = {task["task"] for task in results["tasks"]}
    samples = {task["n"] for task in results["tasks"]}
    return "\n".join(
        [
            markdown_table(results),
            "",
            f"`make demo` on {date}, {machine} ({results['environment']['cpu']}): the bundled reference model,",
            f"{len(names)} retrieval tasks with {'/'.join(map(str, sorted(samples)))} samples each at 1,024 tokens. "
            f"Every figure is in [{kept.name}]({kept}).",
        ]
    )


if __name__ == "__main__":
    main()
