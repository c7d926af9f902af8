"""kvcompress methods: the registry."""

from __future__ import annotations

import typer

from kvcompress_cli.options import Json
from kvcompress_cli.show import print_json, table


def register(app: typer.Typer) -> None:
    app.command("methods", epilog="Example: kvcompress methods --json")(methods)


def methods(json: Json = False) -> None:
    """List the methods a recipe may use, with their parameters."""
    from kvcompress.methods.registry import describe

    entries = describe()
    if json:
        print_json(entries)
        return
    rows = []
    for entry in entries:
        parameters = [name for name in entry["parameters"]["properties"] if name != "method"]
        rows.append((entry["name"], entry["kind"], entry["summary"], ", ".join(parameters), entry["paper"]))
    table("Methods", ("name", "kind", "what it does", "parameters", "source"), rows)
