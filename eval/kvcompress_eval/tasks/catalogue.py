"""Every task beside RULER's, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kvcompress_eval.tasks import longbench2, mrcr, multi_turn, needle_grid
from kvcompress_eval.tasks.infinitebench import generated as infinitebench
from kvcompress_eval.tasks.longbench import sets as longbench
from kvcompress_eval.tasks.questions import Ask, Questions
from kvcompress_eval.tasks.ruler import TASKS as RULER


@dataclass(frozen=True)
class Task:
    """How the questions are made, and whether they come from files, whose texts have lengths of their own."""

    make: Callable[[Ask], Questions]
    from_files: bool = False


def _longbench() -> dict[str, Task]:
    sets = longbench.data_sets()
    plain = {f"longbench_{name}": Task(partial(longbench.make, name), True) for name in sets}
    even = {
        f"longbench_e_{name}": Task(partial(longbench.make, name, even=True), True)
        for name, entry in sets.items()
        if entry.even
    }
    return plain | even


LONGBENCH = _longbench()
# The published generators are followed where there are any; see infinitebench/drawing.py.
INFINITEBENCH = {
    f"infinitebench_{name}{'_syn' if name in ('math_find', 'code_run') else ''}": Task(
        partial(infinitebench.make, name)
    )
    for name in infinitebench.GENERATED
}
MRCR = {f"mrcr_syn_{needles}needle": Task(partial(mrcr.make, needles=needles)) for needles in mrcr.NEEDLES}

TASKS: dict[str, Task] = {
    **LONGBENCH,
    "longbench2": Task(longbench2.make, True),
    "longbench2_cot": Task(partial(longbench2.make, thought=True), True),
    **INFINITEBENCH,
    "needle_grid": Task(needle_grid.make),
    **MRCR,
    "multi_turn": Task(multi_turn.make),
}


def check_task(name: str) -> None:
    """Refuse an unknown task.

    Raises:
        ValueError: no such task.
    """
    if name not in RULER and name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join([*RULER, *TASKS])}")
