"""Do two engines give the same answers? Every sample on which they differ, and by how little it was decided.

Greedy decoding turns a rounding difference into another answer only where two tokens are nearly tied. The margin says
how nearly: the log probability of the one engine's token over the other's, at the first place where they part. On an
uncompressed model a large margin is a fault of one of the engines. In a compressed cache rounding can also turn a code
or a gain into its neighbour, and then a margin may be as large as what the codec itself does to the logits; the same
happens within one engine when a prompt is fed in other pieces.

`python -m kvcompress_eval.parity DIR... --baseline BASE --suite needle-ref --samples 10 --out parity` prints the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvcompress_eval.engines import Engine, open_engine
from kvcompress_eval.evaluate import run
from kvcompress_eval.models import Model, describe_models, end_tokens
from kvcompress_eval.suite import Suite
from kvcompress_eval.tasks.agreement import first_difference
from kvcompress_eval.tasks.ruler import BASE, NO_FILES
from kvcompress_eval.tokenizer import TextTokenizer
from kvcompress_eval.work import default_cache_dir, prepare

ENGINES = ("transformers", "vllm")


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
    margin: float
    """Log probability, in nats, of the first engine's token over the second's, as transformers computes it."""


def compare_engines(
    candidates: Sequence[str | Path],
    *,
    out: str | Path,
    baseline: str | Path | None,
    suite: Suite,
    seed: int = 42,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> tuple[dict[str, dict[str, Any]], list[Difference]]:
    """Run the tasks of a suite on both engines; the results of each, and the samples that differ.

    Args:
        options: further arguments of `run`.
    """
    out = Path(out)
    shared: dict[str, Any] = {"baseline": baseline, "suite": suite, "seed": seed, "dtype": "float32", **options}
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    results = {
        engine: run(list(candidates), engine=engine, out=out / engine, cache_dir=cache, **shared) for engine in ENGINES
    }
    differences: list[Difference] = []
    for model in describe_models(candidates, baseline):
        differences += _differences(model, out, suite, seed, cache)
    return results, differences


def _differences(model: Model, out: Path, suite: Suite, seed: int, cache: Path) -> list[Difference]:
    """The samples on which the rows of the two engines differ; the model is loaded only if there are any."""
    tokenizer = TextTokenizer(model.folder)
    work = prepare(
        suite,
        [model],
        tokenizer,
        seed=seed,
        template=BASE,
        sources=NO_FILES,
        cache_dir=cache,
        progress=lambda what, done, total: None,
    )
    engine: Engine | None = None
    found = []
    for unit in work.units:
        name = f"{unit.task}-{unit.length}-{model.name}.jsonl"
        first, second = (_rows(out / kind / "samples" / name) for kind in ENGINES)
        for index, (one, two) in enumerate(zip(first, second, strict=True)):
            assert one["prompt_sha256"] == two["prompt_sha256"], "both engines were asked the same"
            at = first_difference(one["tokens"], two["tokens"])
            if at is None:
                continue
            engine = engine or open_engine("transformers", model.folder, tokenizer, max_context=0, dtype="float32")
            end = min(end_tokens(model.folder), default=0)
            pair = [row["tokens"][at] if at < len(row["tokens"]) else end for row in (one, two)]
            found.append(
                Difference(
                    model=model.name,
                    task=unit.task,
                    length=unit.length,
                    index=index,
                    scores=(one["score"], two["score"]),
                    answers=(one["prediction"], two["prediction"]),
                    at=at,
                    tokens=(tokenizer.decode(pair[:1]), tokenizer.decode(pair[1:])),
                    margin=margin(engine, [*unit.prompts[index], *one["tokens"][:at]], pair[0], pair[1]),
                )
            )
    if engine is not None:
        engine.close()
    return found


def margin(engine: Engine, context: Sequence[int], one: int, two: int) -> float:
    """Log probability of token `one` over `two` after `context`, in nats."""
    return float(engine.score([*context, one]).log_probs_T[-1]) - float(engine.score([*context, two]).log_probs_T[-1])


def markdown(results: Mapping[str, Mapping[str, Any]], differences: Sequence[Difference]) -> str:
    """Scores of both engines by task and model, then every sample that differs."""
    lines = [f"| task | length | model | {' | '.join(results)} | samples that differ |", "|" + " --- |" * 6]
    for one, two in zip(*(rows["tasks"] for rows in results.values()), strict=True):
        key = one["task"], one["length"], one["model"]
        count = sum((item.task, item.length, item.model) == key for item in differences)
        lines.append(f"| {key[0]} | {key[1]:,} | {key[2]} | {one['score']} | {two['score']} | {count} of {one['n']} |")
    if differences:
        lines += ["", "| sample | scores | same tokens | then | margin, nats | answers |", "|" + " --- |" * 6]
    for item in differences:
        where = f"{item.model}, {item.task}, {item.length:,}, {item.index}"
        then, answers = (" / ".join(f"`{_cell(text)}`" for text in pair) for pair in (item.tokens, item.answers))
        scores = " / ".join(f"{score:.2f}" for score in item.scores)
        lines.append(f"| {where} | {scores} | {item.at} | {then} | {item.margin:+.4f} | {answers} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def main() -> None:
    import argparse

    from kvcompress_eval.evaluate import choose_suite

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--baseline")
    parser.add_argument("--suite", default="needle-ref")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    suite = choose_suite(given.suite, samples=given.samples, lengths=given.lengths)
    results, differences = compare_engines(
        given.models, out=given.out, baseline=given.baseline, suite=suite, resume=True
    )
    (given.out / "differences.json").write_text(json.dumps([asdict(item) for item in differences], indent=1) + "\n")
    print(markdown(results, differences), end="")


if __name__ == "__main__":
    main()
