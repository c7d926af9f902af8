"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcompress.codec.codes.registry import listed, widths

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a Hugging Face checkpoint, or a hub id.")]
Directory = Annotated[str, typer.Argument(metavar="DIR", help="Folder (or hub id) of a compressed checkpoint.")]
RecipeFile = Annotated[Path, typer.Option("--recipe", "-r", help="Recipe file (YAML); see examples/recipes.")]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse a model family that kvcompress does not know.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
KvRank = Annotated[
    float, typer.Option(help="Use this share of the stored channels: less memory, more loss, nothing rewritten.")
]
KvBits = Annotated[
    int,
    typer.Option(
        help=f"Store no channel in more than this many bits ({listed(widths()[1:])}); likewise.", show_default=False
    ),
]
