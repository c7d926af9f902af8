"""kvcompress compress: checkpoint in, compressed checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcompress_cli.options import Json, Model, RecipeFile, Strict
from kvcompress_cli.show import print_json, progress


def register(app: typer.Typer) -> None:
    example = "Example: kvcompress compress meta-llama/Llama-3.1-8B -r examples/recipes/balanced.yaml --out llama-4x"
    app.command("compress", epilog=example)(compress)


def compress(
    model: Model,
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must not exist.")],
    calibration: Annotated[
        str,
        typer.Option(
            help="'builtin' (texts of many kinds), 'self' (text the model writes itself), or a file: plain text, or "
            ".jsonl or .json rows with 'text', 'messages' or 'input_ids'."
        ),
    ] = "builtin",
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens per calibration sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Chooses the calibration sequences.")] = 0,
    device: Annotated[str, typer.Option(help="Where to calibrate: cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Precision to calibrate in: float32, bfloat16, float16.")] = "float32",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    strict: Strict = False,
    json: Json = False,
) -> None:
    """Compress a checkpoint. The output appears complete or not at all. Under torchrun, training uses every process."""
    from kvcompress import recipe as recipes
    from kvcompress.methods.registry import schemas
    from kvcompress.training import distributed

    if distributed.rank() > 0:
        distributed.follow()
        return

    checked = recipes.load(recipe, schemas())
    from kvcompress.pipeline.compress import Options
    from kvcompress.pipeline.compress import compress as run

    options = Options(calibration, samples, length, seed, device, dtype, resume, strict)
    with progress() as report:
        plan = run(model, checked, out, options, report)
    if json:
        print_json({"out": str(out), **plan.to_json()})
    else:
        sizes = f"{plan.base_bytes_per_token:,} -> {plan.bytes_per_token:,} bytes of cache per token"
        print(f"{out}: {sizes} ({plan.ratio:.2f}x). Next: kvcompress eval {out} --baseline {model}")
