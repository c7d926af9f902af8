"""kvcompress inspect: what was done to a checkpoint, layer by layer."""

from __future__ import annotations

import typer

from kvcompress_cli.options import Directory, Json
from kvcompress_cli.plan import show_layers
from kvcompress_cli.show import print_json, size, table


def register(app: typer.Typer) -> None:
    app.command("inspect", epilog="Example: kvcompress inspect llama-4x --json")(inspect)


def inspect(directory: Directory, json: Json = False) -> None:
    """Show the manifest: recipe, provenance, savings and measured error per layer."""
    from kvcompress.checkpoint.manifest import Manifest
    from kvcompress.checkpoint.source import resolve

    manifest = Manifest.load(resolve(directory))
    if json:
        print_json(manifest.model_dump(mode="json"))
        return
    kv, weights, calibration = manifest.bytes_per_token, manifest.weights_bytes, manifest.calibration
    stages = [
        ", ".join(f"{key}={value}" for key, value in stage.items() if value is not None) for stage in manifest.stages
    ]
    rows = [
        ("made from", manifest.parent.source),
        ("by", f"kvcompress {manifest.kvcompress_version}, seed {manifest.seed}"),
        *((f"stage {index + 1}", stage) for index, stage in enumerate(stages)),
        ("calibration", f"{calibration.tokens:,} tokens of {calibration.name}" if calibration else "none"),
        ("KV cache, bytes per token", f"{kv.base:,} -> {kv.compressed:,} ({kv.ratio:.2f}x)"),
        ("weights", f"{size(weights.base)} -> {size(weights.compressed)}"),
        ("manifest sha256", manifest.sha256),
    ]
    table(str(directory), ("", ""), rows)
    show_layers(manifest.layers)
