"""kvcompress eval: suites on a checkpoint and its baseline, with a verdict."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcompress.codec.nested import WIDEST
from kvcompress_cli.options import Json, KvBits, KvRank
from kvcompress_cli.show import print_json, progress, table

if TYPE_CHECKING:
    from collections.abc import Mapping


def register(app: typer.Typer) -> None:
    example = "Example: kvcompress eval llama-4x --baseline meta-llama/Llama-3.1-8B --suite ruler -o report"
    app.command("eval", epilog=example)(evaluate)


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Checkpoints to evaluate; with --compare recipes, too.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for results.json, report.html and samples.")],
    baseline: Annotated[str | None, typer.Option(help="The model to compare with; its rows get verdicts.")] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="quick, ruler, ruler-syn, ruler-13, needle-ref, text, longbench, longbench-no-jieba, longbench-e, "
            "longbench2, longbench2-cot, infinitebench, needle-grid, mrcr, multi-turn or drift."
        ),
    ] = "quick",
    tasks: Annotated[
        str | None, typer.Option(help="Tasks by name, e.g. vt,niah_single_2_syn,longbench_qasper; else the suite's.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", "--length", help="Context lengths, e.g. 512,1024; the suite's own by default."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Samples per task and length.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many samples per task.")] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="auto (vLLM for tasks where it can serve the models, transformers for text), transformers, vllm, or "
            "the URL of an OpenAI-compatible server."
        ),
    ] = "auto",
    kv_rank: KvRank = 1.0,
    kv_bits: KvBits = WIDEST,
    dtype: Annotated[str, typer.Option(help="Precision to run in; auto is float32 on a CPU.")] = "auto",
    template: Annotated[
        str | None,
        typer.Option(
            help="Around prompts: base; chat for the tokenizer's own; auto for chat where there is one; RULER's: "
            "meta-llama3, Phi3, ... By default the suite's: auto in quick, base in all others."
        ),
    ] = None,
    essay: Annotated[Path | None, typer.Option(help="Essays for RULER: PaulGrahamEssays.json, or a text file.")] = None,
    squad: Annotated[Path | None, typer.Option(help="SQuAD 2.0's dev-v2.0.json, for RULER's qa_1.")] = None,
    hotpotqa: Annotated[Path | None, typer.Option(help="hotpot_dev_distractor_v1.json, for RULER's qa_2.")] = None,
    words: Annotated[
        Path | None, typer.Option(help="More English words, for RULER's cwe at lengths that its own do not fill.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with LongBench's files, as they ship.")] = None,
    allow_network: Annotated[
        bool, typer.Option("--allow-network", help="Download what --data does not hold. Nothing is otherwise.")
    ] = False,
    drift_tokens: Annotated[int | None, typer.Option(help="Tokens over which suite drift follows the models.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Held-out text, a UTF-8 file; by default the kinds that come with kvcompress.")
    ] = None,
    margin: Annotated[float, typer.Option(help="Loss in points that the verdict tolerates.")] = 1.0,
    serving_context: Annotated[int, typer.Option(help="Also measure decode speed after this many tokens.")] = 0,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Recipes (.yaml) and checkpoints against the base, which comes first."),
    ] = False,
    noise_floor: Annotated[
        bool, typer.Option("--noise-floor", help="Run the base on another seed's prompts too: how far chance reaches.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 42,
    resume: Annotated[bool, typer.Option("--resume", help="Reuse what is finished in the output folder.")] = False,
    json: Json = False,
) -> None:
    """Measure what compression cost. Exit code 1 when the verdict is 'worse'."""
    from kvcompress_eval.evaluate import run
    from kvcompress_eval.report import write_report, write_table
    from kvcompress_eval.report.wording import measured_sentence
    from kvcompress_eval.tasks.ruler.sources import Sources

    with progress() as report:
        if compare:
            from kvcompress_eval.candidates import make_checkpoints, split_base

            baseline, models = split_base(models, baseline)
            models = make_checkpoints(baseline, models, out / "models", report)
        results = run(
            models,
            out=out,
            baseline=baseline,
            suite=suite,
            tasks=tasks.split(",") if tasks else None,
            lengths=_numbers(lengths),
            samples=samples,
            limit=limit,
            engine=engine,
            kv_rank=kv_rank,
            kv_bits=kv_bits,
            dtype=dtype,
            template=template,
            sources=Sources(essay=essay, squad=squad, hotpotqa=hotpotqa, words=words),
            data=data,
            allow_network=allow_network,
            drift_tokens=drift_tokens,
            text=text,
            margin=margin,
            serving_context=serving_context,
            seed=seed,
            noise_floor=noise_floor,
            resume=resume,
            progress=report,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    write_report(results, out / "report.html")
    write_table(results, out / "table.md")
    if json:
        print_json(results)
    else:
        _show(results)
        print(measured_sentence(results))
        print(f"{out / 'report.html'}: the report; {out / 'results.json'}: the figures; {out / 'table.md'}: a table")
    if any(row["verdict"] == "worse" for row in results["overall"]):
        raise typer.Exit(1)


def _numbers(lengths: str | None) -> list[int] | None:
    if lengths is None:
        return None
    try:
        return [int(part) for part in lengths.split(",")]
    except ValueError:
        raise ValueError(f"found --lengths {lengths!r}; expected numbers separated by commas, e.g. 512,1024") from None


def _show(results: Mapping[str, Any]) -> None:
    from kvcompress_eval.report.figures import divergences
    from kvcompress_eval.report.wording import tail_sentence, verdict_sentence

    rows = [
        (row["task"], str(row["length"]), row["model"], f"{row['score']:.2f}", _interval(row["ci95"]), _delta(row))
        for row in results["tasks"]
    ]
    rows += [
        ("all tasks", "", row["model"], f"{row['score']:.2f}", _interval(row["ci95"]), _delta(row))
        for row in results["overall"]
    ]
    rows += [row for model in results["perplexity"].get("models", []) for row in _text_rows(model)]
    rows += [
        (
            f"KL, {source}: mean, 99 %, 99.9 %",
            "",
            row["model"],
            divergences(row[source]) or "-",
            "",
            _agreed(row[source]),
        )
        for row in results["agreement"].get("models", [])
        for source in ("text", "tasks")
        if source in row
    ]
    table("Results", ("task", "length", "model", "score", "95 % interval", "against the baseline"), rows)
    agreement = {row["model"]: row.get("text") for row in results["agreement"].get("models", [])}
    for row in results["overall"]:
        if row["verdict"]:
            sentence = verdict_sentence(row, results["margin"], results["multiplicity"]["overall"])
            print(f"{row['model']}: {sentence} {tail_sentence(agreement.get(row['model']))}".rstrip())
    for row in results["skipped"]:
        print(f"left out: {row['task']} at {row['length']}: {row['reason']}")


def _text_rows(model: Mapping[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """Perplexity over all text, and of each kind."""
    kinds = [("perplexity", model), *((f"perplexity, {kind['kind']}", kind) for kind in model["kinds"])]
    return [(what, "", model["model"], f"{row['perplexity']:.3f}", "", _increase(row)) for what, row in kinds]


def _increase(row: Mapping[str, Any]) -> str:
    return "" if row.get("increase") is None else f"{100 * row['increase']:+.2f} %"


def _agreed(row: Mapping[str, Any]) -> str:
    return f"{100 * row['top1']:.1f} % same next token, {row['tokens']:,} tokens"


def _interval(bounds: list[float]) -> str:
    return f"{bounds[0]:.1f} to {bounds[1]:.1f}"


def _delta(row: Mapping[str, Any]) -> str:
    return "" if row["delta"] is None else f"{row['delta']:+.2f}: {row['verdict']}"
