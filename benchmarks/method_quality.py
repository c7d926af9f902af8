"""Quality at equal bytes: every method on the bundled reference model, at 2, 4 and 8 times fewer cache bytes.

    python benchmarks/method_quality.py --work build/quality [--samples 20] [--only xkv,gear]

Per row: bytes of cache per token, score on the retrieval tasks (RULER's prompts at 1,024 tokens), perplexity and
KL(base || row) on held-out text. Tasks run through vLLM where it serves the row, else through transformers; text runs
through transformers in float32. Rows are kept in --work and not measured again; the table goes to benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kvcompress_eval
from kvcompress_eval.engines import baseline_caches, open_engine
from kvcompress_eval.environment import environment
from kvcompress_eval.suite import SUITES, Suite
from kvcompress_eval.tasks.agreement import kl_per_token
from kvcompress_eval.tasks.text import read_texts
from kvcompress_eval.tokenizer import TextTokenizer
from rich.console import Console
from rich.table import Table

from kvcompress import recipe as recipes
from kvcompress.geometry import ModelGeometry
from kvcompress.methods import registry
from kvcompress.pipeline.compress import Options, compress

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "assets" / "reference-model"
TEXT = Suite(summary="", text_tokens=16384)
HELDOUT = MODEL / "heldout.txt"
KL_WINDOWS, KL_TOKENS = 8, 1024


@dataclass(frozen=True)
class Row:
    """One line of the table: a recipe's stages, or the name of an integer cache."""

    label: str
    times: int
    stages: list[str] = field(default_factory=list)
    cache: str | None = None
    vllm: bool = True

    @property
    def name(self) -> str:
        return "-".join([*re.findall(r"\w+", self.label), f"{self.times}x"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and rows")
    parser.add_argument("--samples", type=int, default=20, help="per task")
    parser.add_argument("--only", default="", help="labels that contain one of these words, separated by commas")
    parser.add_argument("--machine", default="cpu", help="short name of the machine for the file's name")
    args = parser.parse_args()
    wanted = [word for word in args.only.split(",") if word]
    rows = [row for row in table() if not wanted or any(word in row.label for word in wanted)]
    measured = [measure(Row("base", 1), args.work, args.samples)]
    measured += [measure(row, args.work, args.samples) for row in rows]
    show(measured)
    path = ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-{args.machine}-methods.json"
    content = {"samples_per_task": args.samples, "environment": environment(), "rows": measured}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(path)


SMALL_STEPS = {"max_num_batched_tokens": 128}
"""For xkv, which attends a step's own tokens as they are: nearly all of a prompt is then read as it is stored."""

SHARES = {2: 0.5, 4: 0.25, 8: 0.125}
"""Share of the channels that 16-bit codes may keep."""

TARGETS = {2: 7.75, 4: 3.75, 8: 1.75}
"""Bits per channel of the scalar codec beside its gain (16 bits per token, head and side of 64 channels)."""

GEAR = {2: "bits: {k: 8, v: 4}, outliers: 0.015", 4: "bits: 2, outliers: 0.015"}
"""Alone it ends at 4x: its codes have 2 bits at least."""

CUT_GEAR = {
    2: ("0.75", "bits: 8"),
    4: ("0.625", "bits: 4, outliers: 0.01"),
    8: ("0.5", "bits: 2, outliers: 0.01, rank: 1"),
}
"""Channels kept by a basis before GEAR, and GEAR's options."""


def table() -> list[Row]:
    """What is compared: first what a user has today, then methods alone, then combinations."""
    rows = []
    for times, share in SHARES.items():
        channels = round(64 * share)
        sixteen = "{method: scalar, bits: 16}"
        codes = f"{{method: scalar, target_bits_per_channel: {TARGETS[times]}}}"
        per_layer = f"{{method: scalar, target_bits_per_channel: {{k: {TARGETS[times]}, v: {TARGETS[times]}}}}}"
        rank, gear = CUT_GEAR[times]
        transmla = f"{{method: transmla, target_ratio: {times}.0}}"
        rows += [
            Row("uniform low rank", times, [f"{{method: pca, metric: none, rank: {channels}}}", sixteen]),
            Row("pca", times, [f"{{method: pca, rank: {channels}}}", sixteen]),
            Row("matryoshka", times, [f"{{method: matryoshka, rank: {channels}}}", sixteen]),
            Row("xkv", times, [f"{{method: xkv, group: 4, rank: {share}}}", sixteen]),
            Row("xkv (prompt)", times, [f"{{method: xkv, basis: prompt, group: 4, rank: {share}}}"], vllm=False),
            Row("scalar", times, [per_layer]),
            Row("transmla", times, [transmla]),
            Row("transmla, healed", times, [transmla, "{method: heal}"]),
            Row("pca + scalar", times, ["{method: pca}", codes]),
            Row("matryoshka + scalar", times, ["{method: matryoshka, rank: 1.0}", codes]),
            Row("xkv + scalar", times, ["{method: xkv, group: 4, rank: 1.0}", per_layer]),
            Row("xkv (v) + scalar", times, ["{method: xkv, share: v, group: 4, rank: 1.0}", per_layer]),
            Row("matryoshka + gear", times, [f"{{method: matryoshka, rank: {rank}}}", f"{{method: gear, {gear}}}"]),
        ]
        if times in GEAR:
            rows.append(Row("gear", times, [f"{{method: gear, {GEAR[times]}}}"]))
    return [Row("int4 per token", 4, cache="int4"), Row("int2 per token", 8, cache="int2"), *rows]


def measure(row: Row, work: Path, samples: int) -> dict[str, Any]:
    """One row, from disk if it was measured before."""
    kept = work / f"{row.name}-{samples}.json"
    if kept.is_file():
        done: dict[str, Any] = json.loads(kept.read_text())
        return done
    print(f"== {row.name}", flush=True)
    folder = MODEL if not row.stages else compressed(row, work / "models")
    options: dict[str, Any] = {} if row.cache is None else {"cache": row.cache}
    served = row.vllm and row.cache is None
    tasks = kvcompress_eval.run(
        folder,
        suite=SUITES["needle-ref"],
        samples=samples,
        engine="vllm" if served else "transformers",
        engine_options=SMALL_STEPS if served and "xkv" in row.label else {} if served else options,
        dtype="float32",
        resume=True,
        out=work / "tasks" / row.name,
    )
    text = kvcompress_eval.run(
        folder,
        suite=TEXT,
        text=HELDOUT,
        engine="transformers",
        engine_options=options,
        resume=True,
        out=work / "text" / row.name,
    )
    [overall] = tasks["overall"]
    found = {
        "label": row.label,
        "times": row.times,
        "stages": row.stages,
        "bytes_per_token": bytes_per_token(row, tasks),
        "engine": "vllm" if served else "transformers",
        "score": overall["score"],
        "score_ci95": overall["ci95"],
        "tasks": {task["task"]: task["score"] for task in tasks["tasks"]},
        "perplexity": text["perplexity"]["models"][0]["perplexity"],
        "kl": 0.0 if row.name == "base-1x" else divergence(folder, options),
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found, indent=1) + "\n")
    return found


def compressed(row: Row, models: Path) -> Path:
    """The checkpoint of a row, made once."""
    out = models / row.name
    if not out.is_dir():
        models.mkdir(parents=True, exist_ok=True)
        recipe = recipes.parse(f"version: 1\nstages: [{', '.join(row.stages)}]\n", registry.schemas())
        compress(str(MODEL), recipe, out, Options(resume=True), lambda *_: None)
    return out


def bytes_per_token(row: Row, results: dict[str, Any]) -> float:
    if row.cache is None:
        return float(results["models"][0]["bytes_per_token"])
    geometry = ModelGeometry.from_config(json.loads((MODEL / "config.json").read_text()))
    return baseline_caches.bytes_per_token(row.cache, geometry.num_layers, geometry.num_kv_heads, geometry.head_dim)


def divergence(folder: Path, options: dict[str, Any]) -> float:
    """Mean KL(base || row) in nats per token over windows of held-out text."""
    tokenizer = TextTokenizer(MODEL)
    tokens = read_texts(HELDOUT, tokenizer, KL_WINDOWS * KL_TOKENS)[0].tokens
    windows = [tokens[start : start + KL_TOKENS] for start in range(0, KL_WINDOWS * KL_TOKENS, KL_TOKENS)]
    total, count = 0.0, 0
    engines = [
        open_engine("transformers", path, tokenizer, max_context=KL_TOKENS, **extra)
        for path, extra in ((MODEL, {}), (folder, options))
    ]
    for window in windows:
        base, ours = (engine.score(window, distribution=True).distribution_TV for engine in engines)
        assert base is not None
        assert ours is not None
        total, count = total + float(kl_per_token(base, ours).sum()), count + len(base)
    for engine in engines:
        engine.close()
    return total / count


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table, grouped by compression."""
    base = rows[0]["bytes_per_token"]
    shown = Table("cache", "bytes/token", "ratio", "tasks", "perplexity", "KL")
    for row in sorted(rows, key=lambda row: (row["times"], -row["score"])):
        shown.add_row(
            row["label"],
            f"{row['bytes_per_token']:,.0f}",
            f"{base / row['bytes_per_token']:.2f}x",
            f"{row['score']:.1f}",
            f"{row['perplexity']:.2f}",
            f"{row['kl']:.4f}",
        )
    Console(width=100).print(shown)


if __name__ == "__main__":
    main()
