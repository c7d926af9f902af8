"""kvcompress eval: suites on a checkpoint and its baseline, with a verdict."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    pass
