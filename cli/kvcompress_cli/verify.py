"""kvcompress verify: recompute every hash of a compressed checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from kvcompress_cli.options import Directory, Json
from kvcompress_cli.show import print_json, progress


def register(app: typer.Typer) -> None:
    app.command("verify", epilog="Example: kvcompress verify llama-4x")(verify)


def verify(
    directory: Directory,
    accept: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Record your change of a side file, such as chat_template.jinja, first."),
    ] = None,
    json: Json = False,
) -> None:
    """Check every byte against the manifest. Exit code 1 and the first tensor that differs if one does.

    Files that are no part of the model, such as README.md, may change: that is told, and no error.
    """
    from kvcompress.checkpoint.source import resolve
    from kvcompress.checkpoint.verify import accept as record
    from kvcompress.checkpoint.verify import remedy
    from kvcompress.checkpoint.verify import verify as run

    folder = resolve(directory)
    recorded = record(folder, accept or [])
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with progress() as tell:
        hashed = 0

        def advance(count: int) -> None:
            nonlocal hashed
            hashed += count
            tell("hashing", min(hashed, total), total)

        report = run(folder, advance)
        tell("hashing", total, total)
    if json:
        print_json(report.to_json())
    else:
        for name in recorded:
            print(f"accepted: {name} as it is now; the manifest keeps its hash from before")
        for document in report.documents:
            print(f"changed, not part of the model: {document.tensor} ({document.found})")
        if report.ok:
            print(f"ok: {report.checked - len(report.documents)} hashes match")
        else:
            typer.echo(f"error: {directory}: {report.mismatches[0]}; {remedy(report, directory)}", err=True)
    if not report.ok:
        raise typer.Exit(1)
