"""Printing shared by the commands: JSON, byte sizes, tables, progress."""

from __future__ import annotations

import json
import sys
import time
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


EVERY = 30.0
"""Seconds between two lines about the same step, away from a terminal."""


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left per step on standard error; away from a terminal, a line when a step starts and ends,
    and every half a minute in between one with what is done and how long is left."""
    if not sys.stderr.isatty():
        yield Lines(lambda line: print(line, file=sys.stderr, flush=True), time.monotonic)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(elapsed_when_finished=False),
        # Steps of minutes: an estimate from the last half minute alone would be of nothing.
        speed_estimate_period=3600,
        console=Console(stderr=True),
    ) as bars:
        tasks: dict[str, Any] = {}

        def bar(step: str, done: int, total: int) -> None:
            if is_remark(done, total) and step not in tasks:
                bars.console.print(step, markup=False, highlight=False)
                return
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield bar


def is_remark(done: int, total: int) -> bool:
    """Whether a step that was never begun is none, but something to be said: it has one part, and that is done."""
    return done == total == 1


class Lines:
    """Progress as lines of text.

    Args:
        write: takes a line.
        clock: seconds, from any beginning.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._write, self._clock = write, clock
        self._began: dict[str, tuple[float, int]] = {}
        """Per step: when it was first heard of, and how much was done then."""
        self._last: dict[str, float] = {}
        self._finished: set[str] = set()

    def __call__(self, step: str, done: int, total: int) -> None:
        now, finished = self._clock(), done >= total
        if is_remark(done, total) and step not in self._began:
            self._write(step)
            return
        if step not in self._began or (step in self._finished and not finished):
            self._began[step] = now, done
            self._finished.discard(step)
            if not finished:
                self._tell(step, "started", now)
        if finished:
            if step not in self._finished:
                self._finished.add(step)
                self._tell(step, "done", now)
        elif now - self._last[step] >= EVERY:
            began, before = self._began[step]
            left = (now - began) / (done - before) * (total - done) if done > before else None
            share = f"{done:,} of {total:,}" if total <= MOST_COUNTED else f"{100 * done / total:.0f} %"
            self._tell(step, share + ("" if left is None else f", about {duration(left)} left"), now)

    def _tell(self, step: str, text: str, now: float) -> None:
        self._last[step] = now
        self._write(f"{step}: {text}")


MOST_COUNTED = 9999
"""Larger totals are bytes or tokens, of which only the share says something."""


def duration(seconds: float) -> str:
    """Rounded to what matters: seconds below two minutes, minutes below two hours."""
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
