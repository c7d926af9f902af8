"""Runs of training: from which step on, how long and how many the sequences are, the share of each task, the rates."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Phase:
    """Sequences of `length` tokens, `rows` of them a step, from step `start` on."""

    start: int
    length: int
    rows: int
    shares: dict[str, float]


@dataclass(frozen=True)
class Schedule:
    """A run: the learning rate warms up to `peak` of the full one, stays, and falls to `floor` in the last `decay`."""

    phases: list[Phase]
    steps: int
    peak: float = 1.0
    decay: float = 0.45
    floor: float = 0.02


# From scratch, look-up must be learned in a drill first: prompts of the benchmark alone leave it at chance.
DRILL = [Phase(0, 128, 16, {"recall": 0.6, "repeats": 0.25, "text": 0.15})]
DRILL_STEPS = 1600

# A model that can look up learns the benchmark's tasks fastest in short contexts, where answers are dense.
SHORT = {"tracking_drill": 0.36, "tracking": 0.06, "multikey": 0.15, "multivalue": 0.16, "multiquery": 0.08}
SHORT |= {"needles": 0.06, "recall": 0.02, "text": 0.11}
MIX = {"multikey": 0.17, "multivalue": 0.16, "multiquery": 0.1, "tracking": 0.17, "tracking_drill": 0.1, "single": 0.02}
MIX |= {"needles": 0.07, "uuids": 0.02, "recall": 0.01, "text": 0.18}
TASK_PHASES = [Phase(0, 256, 8, SHORT), Phase(750, 512, 4, MIX), Phase(1750, 1024, 2, MIX)]
TASK_STEPS = 3500

# Last, weight goes where the benchmark's score still lags: several values of one key.
POLISH_SHORT = {"listing": 0.36, "multivalue": 0.24, "multiquery": 0.1, "tracking_drill": 0.1, "tracking": 0.02}
POLISH_SHORT |= {"multikey": 0.04, "needles": 0.04, "text": 0.1}
POLISH = {"multivalue": 0.58, "multiquery": 0.13, "tracking": 0.09, "tracking_drill": 0.02, "multikey": 0.04}
POLISH |= {"needles": 0.04, "single": 0.01, "text": 0.09}
POLISH_PHASES = [Phase(0, 256, 8, POLISH_SHORT), Phase(900, 512, 4, POLISH), Phase(2200, 1024, 2, POLISH)]
POLISH_STEPS = 4600

# At the end: the benchmark's own length and the tasks that are hardest, at rates that fall to nothing.
FINISH = {"multivalue": 0.32, "multiquery": 0.36, "tracking": 0.1, "tracking_drill": 0.02, "multikey": 0.04}
FINISH |= {"needles": 0.06, "single": 0.01, "text": 0.09}

RUNS = {
    "tasks": Schedule(TASK_PHASES, TASK_STEPS),
    "polish": Schedule(POLISH_PHASES, POLISH_STEPS),
    "finish": Schedule([Phase(0, 1024, 2, FINISH)], 1800, peak=0.6, decay=1.0, floor=0.0),
}

WARMUP_STEPS = 50
RATES = {"matrices": 0.012, "embedding": 0.002, "norms": 0.0015}


def schedule_for(run: str, from_scratch: bool) -> Schedule:
    """A run by its name; a model that starts from random weights is drilled first."""
    found = RUNS[run]
    if not from_scratch:
        return found
    later = [replace(phase, start=phase.start + DRILL_STEPS) for phase in found.phases]
    return replace(found, phases=DRILL + later, steps=DRILL_STEPS + found.steps)


def phase_at(step: int, phases: list[Phase]) -> Phase:
    """The phase that a step belongs to."""
    return [p for p in phases if p.start <= step][-1]


def rate_factor(step: int, schedule: Schedule) -> float:
    """Share of the full learning rate."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    left = (schedule.steps - step) / (schedule.decay * schedule.steps)
    return schedule.peak * warm * max(schedule.floor, min(1.0, left))
