"""Printing shared by the commands: JSON, byte sizes, tables, progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def size(count: float) -> str:
    """Bytes in the largest binary unit below them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; columns of numbers are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    view = Table()
    for index, column in enumerate(columns):
        numbers = all(not row[index] or row[index].lstrip("-+")[:1].isdigit() for row in rows)
        view.add_column(column, justify="right" if numbers and index else "left")
    for row in rows:
        view.add_row(*row)
    # Away from a terminal rich would wrap at 80 columns and cut words that scripts look for.
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    console.print(title)
    console.print(view)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar per step on standard error; away from a terminal, one line when a step starts and ends."""
    if not sys.stderr.isatty():
        finished: dict[str, bool] = {}

        def line(step: str, done: int, total: int) -> None:
            end = done >= total
            if finished.get(step) != end:
                finished[step] = end
                print(f"{step}: {'done' if end else 'started'}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as bars:
        tasks: dict[str, Any] = {}

        def bar(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield bar
