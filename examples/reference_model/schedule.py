"""The phases of training: from which step on, how long and how many the sequences are, and the share of each task."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Phase:
    """Sequences of `length` tokens, `rows` of them a step, from step `start` on."""

    start: int
    length: int
    rows: int
    shares: dict[str, float]


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

WARMUP_STEPS = 50
DECAY_SHARE = 0.45
RATES = {"matrices": 0.012, "embedding": 0.002, "norms": 0.0015}


def phases_for(from_scratch: bool, polish: bool = False) -> tuple[list[Phase], int]:
    """The phases of a run and its number of steps: a model that starts from another needs no drill."""
    if polish:
        return POLISH_PHASES, POLISH_STEPS
    if not from_scratch:
        return TASK_PHASES, TASK_STEPS
    later = [replace(phase, start=phase.start + DRILL_STEPS) for phase in TASK_PHASES]
    return DRILL + later, DRILL_STEPS + TASK_STEPS


def phase_at(step: int, phases: list[Phase]) -> Phase:
    """The phase that a step belongs to."""
    return [p for p in phases if p.start <= step][-1]


def rate_factor(step: int, total: int) -> float:
    """Share of the full learning rate: warm-up, plateau, linear decay to 2 %."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    left = (total - step) / (DECAY_SHARE * total)
    return warm * max(0.02, min(1.0, left))
