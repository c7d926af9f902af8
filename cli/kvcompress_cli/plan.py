"""kvcompress plan: what a recipe will do, from config.json and safetensors headers alone."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvcompress_cli.options import Json, Model, RecipeFile, Strict
from kvcompress_cli.show import print_json, size, table

MOST_MEMORY = 2.0**30
"""GiB; more than any machine has."""


def register(app: typer.Typer) -> None:
    app.command("plan", epilog="Example: kvcompress plan meta-llama/Llama-3.1-8B -r balanced.yaml --memory 20")(plan)


def plan(
    model: Model,
    recipe: RecipeFile,
    context: Annotated[int, typer.Option(help="Tokens of one request.")] = 32768,
    memory: Annotated[float, typer.Option(help="Cache memory to fill, in GiB.")] = 1.0,
    samples: Annotated[int, typer.Option(help="Calibration samples of 512 tokens, for the memory estimate.")] = 32,
    strict: Strict = False,
    json: Json = False,
) -> None:
    """Say what a recipe will cost and save. Reads no weights."""
    from kvcompress import recipe as recipes
    from kvcompress.checkpoint.reader import Checkpoint
    from kvcompress.methods.registry import schemas
    from kvcompress.pipeline.plan import make

    if not 0 < memory < MOST_MEMORY:
        raise ValueError(f"found --memory {memory:g}; expected GiB above 0 and below {MOST_MEMORY:g}")
    if samples < 1:
        raise ValueError(f"found --samples {samples}; expected at least 1")
    checked = recipes.load(recipe, schemas())
    made = make(
        Checkpoint.open(model),
        checked,
        model,
        context=context,
        memory_bytes=int(memory * (1 << 30)),
        calibration_tokens=samples * 512,
        strict=strict,
    ).to_json()
    print_json(made) if json else _show(made)


def _show(made: dict[str, Any]) -> None:
    kv, weights, capacity, request = (
        made[key] for key in ("bytes_per_token", "weights_bytes", "capacity_tokens", "context")
    )
    memory = size(capacity["memory_bytes"])
    table(
        f"{made['model']}: {kv['ratio']:.2f}x smaller cache",
        ("", "base", "compressed"),
        [
            ("KV cache, bytes per token", f"{kv['base']:,}", f"{kv['compressed']:,}"),
            (f"tokens in {memory} of cache", f"{capacity['base']:,}", f"{capacity['compressed']:,}"),
            (
                f"one request of {request['tokens']:,} tokens",
                size(request["base_bytes"]),
                size(request["compressed_bytes"]),
            ),
            ("weights", size(weights["base"]), size(weights["compressed"])),
            ("peak memory of compress (estimate)", "", size(made["peak_rss_bytes"])),
        ],
    )
    show_layers(made["layers"])


def show_layers(layers: list[dict[str, Any]]) -> None:
    """Layer by layer: channels kept, bands, bytes, and where they were measured, the error and how many tokens clip."""
    rows: list[tuple[str, ...]] = []
    for layer in layers:
        if layer["k"] is None:
            rows.append((str(layer["index"]), "uncompressed", layer["reason"], str(layer["bytes_per_token"]), "", ""))
            continue
        error = layer.get("relative_error")
        sides = [_bands(layer[side]) for side in ("k", "v")]
        clipped = [layer[side].get("clipped") for side in ("k", "v")]
        measured = ["" if error is None else f"{error:.4f}", "" if None in clipped else _shares(clipped)]
        rows.append((str(layer["index"]), *sides, str(layer["bytes_per_token"]), *measured))
    table("Layers", ("layer", "keys", "values", "bytes/token", "output error", "tokens that clip"), rows)


def _bands(side: dict[str, Any]) -> str:
    bands = " + ".join(f"{width} ch x {bits} bit" for bits, width in side["bands"])
    return f"{bands}, {side['outliers']} exact" if side.get("outliers") else bands


def _shares(shares: list[float]) -> str:
    return " / ".join(f"{100 * share:.2f} %" for share in shares)
