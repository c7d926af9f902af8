"""The RULER tasks by name: the six that need no download, and variants on the noise haystack under other names."""

from __future__ import annotations

from kvcompress_eval.tasks.ruler.cwe import Cwe
from kvcompress_eval.tasks.ruler.fwe import Fwe
from kvcompress_eval.tasks.ruler.niah import Niah
from kvcompress_eval.tasks.ruler.vt import Vt

RulerTask = Niah | Vt | Cwe | Fwe

OFFICIAL: dict[str, RulerTask] = {
    "niah_single_1": Niah("noise"),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", key_kind="uuids", value_kind="uuids"),
    "vt": Vt(chains=1, hops=4),
    "cwe": Cwe(),
    "fwe": Fwe(),
}

# The benchmark hides several keys, values and queries in essays; scores on noise differ, hence the other names.
VARIANTS: dict[str, RulerTask] = {
    "niah_noise_multikey": Niah("noise", keys=4),
    "niah_noise_multivalue": Niah("noise", values=4),
    "niah_noise_multiquery": Niah("noise", keys=4, queries=4),
    "vt_2hop": Vt(chains=1, hops=2),
}

TASKS: dict[str, RulerTask] = OFFICIAL | VARIANTS


def ruler_task(name: str) -> RulerTask:
    """The task of that name.

    Raises:
        ValueError: no such task.
    """
    if name not in TASKS:
        raise ValueError(f"unknown RULER task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]
