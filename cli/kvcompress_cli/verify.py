"""kvcompress verify: recompute every hash of a compressed checkpoint."""

from __future__ import annotations

import typer

from kvcompress_cli.options import Directory, Json
from kvcompress_cli.show import print_json


def register(app: typer.Typer) -> None:
    app.command("verify", epilog="Example: kvcompress verify llama-4x")(verify)


def verify(directory: Directory, json: Json = False) -> None:
    """Check every byte against the manifest. Exit code 1 and the first tensor that differs if one does."""
    from kvcompress.checkpoint.source import resolve
    from kvcompress.checkpoint.verify import verify as run

    report = run(resolve(directory))
    if json:
        print_json(report.to_json())
    elif report.ok:
        print(f"ok: {report.checked} hashes match")
    else:
        typer.echo(f"error: {directory}: {report.mismatches[0]}", err=True)
    if not report.ok:
        raise typer.Exit(1)
