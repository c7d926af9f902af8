"""The RULER tasks by name: the benchmark's thirteen, and variants on other haystacks under other names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from kvcompress_eval.tasks.ruler.cwe import Cwe
from kvcompress_eval.tasks.ruler.fwe import Fwe
from kvcompress_eval.tasks.ruler.niah import Niah
from kvcompress_eval.tasks.ruler.qa import Qa
from kvcompress_eval.tasks.ruler.sources import Sources
from kvcompress_eval.tasks.ruler.task import Task
from kvcompress_eval.tasks.ruler.vt import Vt

ALL: dict[str, Task] = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", value_kind="uuids"),
    "niah_multikey_1": Niah("essay", keys=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Niah("essay", values=4),
    "niah_multiquery": Niah("essay", queries=4),
    "vt": Vt(chains=1, hops=4),
    "cwe": Cwe(),
    "fwe": Fwe(),
    "qa_1": Qa("squad"),
    "qa_2": Qa("hotpotqa"),
}
"""The benchmark, in its own order."""

OFFICIAL: dict[str, Task] = {name: task for name, task in ALL.items() if not task.needs}
"""Those of it that need no file."""

# The essays in these are generated, so scores are not the benchmark's, hence the other names.
SYNTHETIC: dict[str, Task] = {
    f"{name}_syn": replace(task, haystack="prose")
    for name, task in ALL.items()
    if isinstance(task, Niah) and task.haystack == "essay"
}

VARIANTS: dict[str, Task] = {
    "niah_noise_multikey": Niah("noise", keys=4),
    "niah_noise_multivalue": Niah("noise", values=4),
    "niah_noise_multiquery": Niah("noise", keys=4, queries=4),
    "vt_2hop": Vt(chains=1, hops=2),
}

TASKS: dict[str, Task] = ALL | SYNTHETIC | VARIANTS


def ruler_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: no such task.
    """
    if name not in TASKS:
        raise ValueError(f"unknown RULER task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]


def check_sources(names: Iterable[str], sources: Sources) -> None:
    """Refuse tasks whose files were not given.

    Raises:
        ValueError: naming the first such task and the option that it needs.
    """
    for name in names:
        for file in ruler_task(name).needs:
            try:
                sources.path(file)
            except ValueError as error:
                other = f"; {name}_syn needs none" if f"{name}_syn" in TASKS else ""
                raise ValueError(f"{name}: {error}{other}") from None
