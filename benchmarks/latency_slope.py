"""Time per output token against context: stock vLLM and every codec in one run.

    python benchmarks/latency_slope.py --work build/slope [--contexts 512 2048 8192 16384] [--repeats 5]
    python benchmarks/latency_slope.py --work build/slope --model llama-8b-layer --contexts 4096 16384 --only pca

The second model is one random layer of Llama-3.1-8B's shape: the time of a layer of a real model, without its memory.

Every engine lives in a process of its own and all of them stay up: one repetition times each once, one after the other,
so that other load on the machine falls on all of them. The prompt is in the prefix cache when a time is taken, and what
one token costs is taken off what `TOKENS` more cost. The slope is that of the least-squares line through the medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from cpu_decode import RESULTS, machine, machine_name
from models import MODELS

TOKENS = 16

CODECS = {
    "pca + scalar, 4x": ("{method: pca}", "{method: scalar, target_bits_per_channel: 3.75}"),
    "pca + scalar, 8x": ("{method: pca}", "{method: scalar, target_bits_per_channel: 1.75}"),
    "matryoshka, 2x": ("{method: matryoshka, rank: 0.5, steps: 2, samples: 8}", "{method: scalar, bits: 16}"),
    "xkv + scalar, 4x": (
        "{method: xkv, group: GROUP, rank: 1.0}",
        "{method: scalar, target_bits_per_channel: {k: 3.75, v: 3.75}}",
    ),
    "gear, 4x": ("{method: gear, bits: 2, outliers: 0.015}",),
    "transmla, 2x": ("{method: transmla, target_ratio: 2.0}",),
}
"""Speed does not depend on how well a basis was trained."""


@dataclass
class Worker:
    """One engine."""

    name: str
    process: Any
    pipe: Connection

    def ask(self, *what: Any) -> Any:
        self.pipe.send(what)
        return self.pipe.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--model", choices=MODELS, default="reference-model")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default="", help="codecs that contain one of these words, separated by commas")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    args = parser.parse_args()
    wanted = [word for word in args.only.split(",") if word]
    names = [name for name in CODECS if not wanted or any(word in name for word in wanted)]
    args.work.mkdir(parents=True, exist_ok=True)
    base = MODELS[args.model](args.work)
    folders = {"vLLM": base} | {name: compressed(name, base, args.work / args.model) for name in names}
    longest = max(args.contexts) + TOKENS + 2
    workers = [start(name, folder, longest, args.threads) for name, folder in folders.items()]
    times: dict[str, dict[int, list[float]]] = {worker.name: {} for worker in workers}
    for context in args.contexts:
        for worker in workers:
            worker.ask("fill", context)
        for _ in range(args.repeats):
            for worker in workers:
                times[worker.name].setdefault(context, []).append(worker.ask("time", context))
        print(context, {name: f"{1e3 * statistics.median(found[context]):.2f} ms" for name, found in times.items()})
    for worker in workers:
        worker.ask("stop")
        worker.process.join()
    rows = [row(name, found) for name, found in times.items()]
    stem = f"{datetime.date.today()}-{machine_name()}-slope" + f"-{args.model}" * (args.model != "reference-model")
    result = {
        "what": f"decode, batch 1, {args.model}",
        "machine": machine(args.threads),
        "note": args.note,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, RESULTS / f"{stem}.svg")
    print(RESULTS / f"{stem}.json")


def row(name: str, times: dict[int, list[float]]) -> dict[str, Any]:
    """Milliseconds per token by context, and the line through them."""
    medians = {context: 1e3 * statistics.median(found) for context, found in times.items()}
    slope, start_ms = np.polyfit(list(medians), list(medians.values()), 1)
    return {"cache": name, "ms_per_token": medians, "us_per_1k_tokens": 1e6 * float(slope), "ms_at_0": float(start_ms)}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kvcompress"  # the same figures give the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for entry in rows:
        label = f"{entry['cache']}: {entry['us_per_1k_tokens']:.0f} us per 1K tokens"
        axes.plot(*zip(*entry["ms_per_token"].items(), strict=True), marker="o", label=label)
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("time per output token, ms")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


def compressed(name: str, base: Path, work: Path) -> Path:
    """The checkpoint of a codec, made once."""
    from kvcompress_eval.models import read_config

    from kvcompress import recipe as recipes
    from kvcompress.methods import registry
    from kvcompress.pipeline.compress import Options, compress

    out = work / "".join(letter if letter.isalnum() else "-" for letter in name)
    if not out.is_dir():
        work.mkdir(parents=True, exist_ok=True)
        group = min(4, read_config(base)["num_hidden_layers"])
        stages = ", ".join(CODECS[name]).replace("GROUP", str(group))
        recipe = recipes.parse(f"version: 1\nstages: [{stages}]\n", registry.schemas())
        compress(str(base), recipe, out, Options(samples=16, length=256, resume=True), lambda *_: None)
    return out


def start(name: str, folder: Path, longest: int, threads: int) -> Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, str(folder), longest, threads))
    process.start()
    worker = Worker(name, process, ours)
    assert worker.pipe.recv() == "ready"
    return worker


def serve(pipe: Connection, model: str, longest: int, threads: int) -> None:
    """In the child: an engine that does as it is asked."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": str(threads),
    }
    from vllm import LLM, SamplingParams

    from kvcompress.serving.vllm import register

    register()
    # The model was trained on shorter texts: what it says here means nothing, how long it takes does.
    longer = {"max_position_embeddings": longest}
    llm = LLM(model=model, max_model_len=longest, hf_overrides=longer, enforce_eager=True, max_num_seqs=1)

    def generate(context: int, tokens: int) -> float:
        prompt = {"prompt_token_ids": np.random.default_rng(0).integers(10, 1000, context).tolist()}
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begun = time.perf_counter()
        llm.generate([prompt], sampling, use_tqdm=False)
        return time.perf_counter() - begun

    pipe.send("ready")
    while True:
        what, *given = pipe.recv()
        if what == "stop":
            pipe.send("stopped")
            return
        if what == "fill":
            pipe.send(generate(given[0], 1))
        else:
            one = generate(given[0], 1)
            pipe.send((generate(given[0], 1 + TOKENS) - one) / TOKENS)


if __name__ == "__main__":
    main()
