"""kvcompress_eval: what a compressed model kept, measured on long-context tasks against its base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcompress_eval.evaluate import run
    from kvcompress_eval.report import markdown_table, render, write_report, write_table
    from kvcompress_eval.suite import SUITES, Suite

__all__ = ["SUITES", "Suite", "markdown_table", "render", "run", "write_report", "write_table"]

_HOMES = {"run": "evaluate", "SUITES": "suite", "Suite": "suite"}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the command line shows its help without numpy and scipy.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'report')}"), name)
