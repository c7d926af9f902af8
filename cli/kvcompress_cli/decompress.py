"""kvcompress decompress: back to a plain Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcompress_cli.options import Directory
from kvcompress_cli.show import progress


def register(app: typer.Typer) -> None:
    app.command("decompress", epilog="Example: kvcompress decompress llama-4x --out llama-plain")(decompress)


def decompress(
    directory: Directory, out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must not exist.")]
) -> None:
    """Drop the codec and write the plain checkpoint."""
    from kvcompress.pipeline.decompress import decompress as run

    with progress() as report:
        run(directory, out, report)
    print(f"{out}: a plain checkpoint, without kvcompress")
