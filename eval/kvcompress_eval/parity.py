"""Do two engines give the same answers? Every sample on which they differ, and by how little it was decided.

Greedy decoding turns a rounding difference into another answer only where two tokens are nearly tied. The margin says
how nearly: the log probability of the one engine's token over the other's, at the first place where they part. In a
compressed cache rounding can also turn a code or a gain into its neighbour, which disturbs all later layers and tokens:
an error of 1e-6 grows to tenths of a nat over a prompt of a thousand tokens in 2-bit blocks. So transformers decides
again and again with its attention disturbed, by a rounding error or by as much as the kernels may be wrong: a
difference is explained where it then decides the other way, too, or nearly so.

`python -m kvcompress_eval.parity DIR... --baseline BASE --suite needle-ref --samples 10 --out parity` prints the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvcompress_eval.engines.transformers_engine import PREFILL_CHUNK, TransformersEngine
from kvcompress_eval.evaluate import run
from kvcompress_eval.models import Model, describe_models, end_tokens, is_compressed
from kvcompress_eval.suite import Suite
from kvcompress_eval.tasks.agreement import first_difference
from kvcompress_eval.tasks.data_files import DataSource
from kvcompress_eval.tasks.ruler import BASE, NO_FILES, Sources
from kvcompress_eval.tokenizer import TextTokenizer
from kvcompress_eval.units import Unit, prompt_sha256
from kvcompress_eval.work import default_cache_dir, prepare

Row = dict[str, Any]

ENGINES = ("transformers", "vllm")

ERRORS = (1e-6, 1e-5, 1e-4, 1e-3)
"""Relative errors of the disturbances: from float32 rounding to a third of what the kernels are held to (tests/ops).
They take turns, because larger ones make the attention worse, and not only different."""

TRIES = 4 * len(ERRORS)
"""Disturbances after which a difference stays unexplained."""

TIE = 0.02
"""Nats. Engines that compute in float32 in another order differ by less."""


@dataclass(frozen=True)
class Difference:
    """One sample that two engines answer differently. Pairs are in the order of `ENGINES`."""

    model: str
    task: str
    length: int
    index: int
    scores: tuple[float, float]
    answers: tuple[str, str]
    at: int
    """Generated tokens that are the same."""
    tokens: tuple[str, str]
    """The first tokens that differ, as text."""
    margins: tuple[float, ...]
    """Log probability, in nats, of the first engine's token over the second's by transformers: undisturbed, then
    disturbed until it decides the other way."""

    @property
    def explained(self) -> bool:
        """Whether transformers alone decides both ways, or nearly so."""
        return min(self.margins) < TIE and max(self.margins) > -TIE


@dataclass(frozen=True)
class _Parting:
    """Where two engines part: all but the margins of a difference, and what these are measured on."""

    known: Difference
    prompt: list[int]
    made: list[int]
    pair: tuple[int, int]


def compare_engines(
    candidates: Sequence[str | Path],
    *,
    out: str | Path,
    baseline: str | Path | None,
    suite: Suite,
    seed: int = 42,
    cache_dir: str | Path | None = None,
    sources: Sources = NO_FILES,
    data: str | Path | None = None,
    vllm_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, dict[str, Any]], list[Difference]]:
    """Run the tasks of a suite on both engines; the results of each, and the samples that differ.

    Args:
        vllm_options: further arguments of `vllm.LLM`.
        options: further arguments of `run`.
    """
    out = Path(out)
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    shared: dict[str, Any] = {
        "baseline": baseline,
        "suite": suite,
        "seed": seed,
        "dtype": "float32",
        "cache_dir": cache,
        "sources": sources,
        "data": data,
        **options,
    }
    engine_options = dict(zip(ENGINES, (None, vllm_options), strict=True))
    results = {
        engine: run(list(candidates), engine=engine, engine_options=engine_options[engine], out=out / engine, **shared)
        for engine in ENGINES
    }
    differences: list[Difference] = []
    for model in describe_models(candidates, baseline):
        tokenizer = TextTokenizer(model.folder)
        work = prepare(
            suite,
            [model],
            tokenizer,
            seed=seed,
            template=BASE,
            sources=sources,
            data=DataSource(None if data is None else Path(data)),
            cache_dir=cache,
            progress=lambda what, done, total: None,
        )
        differences += _measured(
            model, tokenizer, [part for unit in work.units for part in _partings(model, tokenizer, out, unit)]
        )
    return results, differences


def _partings(model: Model, tokenizer: TextTokenizer, out: Path, unit: Unit) -> list[_Parting]:
    """The samples of a task on which the rows of the two engines differ, in the first answer or in what follows it."""
    name = f"{unit.task}-{unit.length}-{model.name}.jsonl"
    first, second = (_rows(out / kind / "samples" / name) for kind in ENGINES)
    found = []
    for index, rows in enumerate(zip(first, second, strict=True)):
        for prompt, one, two in _turns(unit, index, *rows):
            assert one["prompt_sha256"] == two["prompt_sha256"] == prompt_sha256(prompt), "both were asked the same"
            at = first_difference(one["tokens"], two["tokens"])
            if at is None:
                continue
            end = min(end_tokens(model.folder, tokenizer), default=0)
            token, other = (row["tokens"][at] if at < len(row["tokens"]) else end for row in (one, two))
            known = Difference(
                model=model.name,
                task=unit.task,
                length=unit.length,
                index=index,
                scores=(rows[0]["score"], rows[1]["score"]),
                answers=(one["prediction"], two["prediction"]),
                at=at,
                tokens=(tokenizer.decode([token]), tokenizer.decode([other])),
                margins=(),
            )
            found.append(_Parting(known, prompt, one["tokens"][:at], (token, other)))
            break  # what is asked next may depend on the answer
    return found


def _turns(unit: Unit, index: int, one: Row, two: Row) -> Iterator[tuple[list[int], Row, Row]]:
    """The prompts of a sample, with what both engines made of each."""
    yield unit.prompts[index], one, two
    if unit.questions is not None and (follow_up := unit.questions.follow_up) is not None:
        again = follow_up.ask(unit.questions.items[index], one["prediction"])
        yield again.prompt, one["follow_up"], two["follow_up"]


def _measured(model: Model, tokenizer: TextTokenizer, partings: Sequence[_Parting]) -> list[Difference]:
    """Their margins; the model is loaded only if there are any."""
    if not partings:
        return []
    engine = TransformersEngine(model.folder, tokenizer, dtype="float32")
    # Without a codec there is nothing that a small error could tip over.
    tries = TRIES if is_compressed(model.folder) else 0
    found = [replace(parting.known, margins=tuple(_margins(engine, parting, tries))) for parting in partings]
    engine.close()
    return found


def _margins(engine: TransformersEngine, parting: _Parting, tries: int) -> Iterator[float]:
    """Undisturbed, then disturbed, until one has the other sign."""
    one, two = parting.pair
    first = 0.0
    for seed in range(tries + 1):
        with engine.disturbed(ERRORS[seed % len(ERRORS)] if seed else 0.0, seed):
            log_probs_V = engine.next_log_probs(parting.prompt, parting.made)
        margin = float(log_probs_V[one]) - float(log_probs_V[two])
        first = margin if seed == 0 else first
        yield margin
        if margin * first <= 0 or abs(margin) < TIE:
            return


def markdown(results: Mapping[str, Mapping[str, Any]], differences: Sequence[Difference]) -> str:
    """Scores of both engines by task and model, then every sample that differs."""
    lines = [f"| task | length | model | {' | '.join(results)} | samples that differ |", "|" + " --- |" * 6]
    for one, two in zip(*(rows["tasks"] for rows in results.values()), strict=True):
        key = one["task"], one["length"], one["model"]
        count = sum((item.task, item.length, item.model) == key for item in differences)
        lines.append(f"| {key[0]} | {key[1]:,} | {key[2]} | {one['score']} | {two['score']} | {count} of {one['n']} |")
    if differences:
        titles = ["sample", "scores", "same tokens", "then", "margin, nats", "tries", "disturbed", "answers"]
        lines += ["", f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for item in differences:
        where = f"{item.model}, {item.task}, {item.length:,}, {item.index}"
        then, answers = (" / ".join(f"`{_cell(text)}`" for text in pair) for pair in (item.tokens, item.answers))
        scores = " / ".join(f"{score:.2f}" for score in item.scores)
        margin, *disturbed = item.margins
        spread = f"{min(disturbed):+.3f} to {max(disturbed):+.3f}" if disturbed else "-"
        spread += "" if item.explained else " (unexplained)"
        cells = [where, scores, item.at, then, f"{margin:+.3f}", len(disturbed), spread, answers]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def main() -> None:
    import argparse

    from kvcompress_eval.evaluate import choose_suite

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--baseline")
    parser.add_argument("--suite", default="needle-ref")
    parser.add_argument("--tasks", nargs="+", help="tasks in place of the suite's")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--data", type=Path, help="folder with the files of LongBench")
    for name in ("essay", "squad", "hotpotqa", "words"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument(
        "--one-by-one",
        action="store_true",
        help="vLLM takes one prompt at a time, in transformers' steps; to compare models whose layers share latents",
    )
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    one_by_one = {"max_num_seqs": 1, "max_num_batched_tokens": PREFILL_CHUNK, "enable_prefix_caching": False}
    results, differences = compare_engines(
        given.models,
        out=given.out,
        baseline=given.baseline,
        suite=choose_suite(given.suite, tasks=given.tasks, samples=given.samples, lengths=given.lengths),
        sources=Sources(essay=given.essay, squad=given.squad, hotpotqa=given.hotpotqa, words=given.words),
        data=given.data,
        vllm_options=one_by_one if given.one_by_one else None,
        resume=True,
    )
    (given.out / "differences.json").write_text(json.dumps([asdict(item) for item in differences], indent=1) + "\n")
    print(markdown(results, differences), end="")


if __name__ == "__main__":
    main()
