"""The phases of training: from which step on, how long and how many the sequences are, and the share of each task."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """Sequences of `length` tokens, `rows` of them a step, from step `start` on."""

    start: int
    length: int
    rows: int
    shares: dict[str, float]


# Look-up must be learned in the drill first: prompts of the benchmark alone leave it at chance.
DRILL = {"recall": 0.6, "repeats": 0.25, "text": 0.15}
SHORT = {"recall": 0.25, "repeats": 0.05, "text": 0.25, "single": 0.08, "multikey": 0.1, "multivalue": 0.07} | {
    "needles": 0.08,
    "tracking_drill": 0.12,
}
FULL = {"recall": 0.04, "text": 0.27, "single": 0.08, "multikey": 0.12, "multivalue": 0.13, "multiquery": 0.13} | {
    "needles": 0.05,
    "uuids": 0.03,
    "tracking": 0.1,
    "tracking_drill": 0.05,
}
PHASES = [
    Phase(0, 128, 16, DRILL),
    Phase(2000, 192, 16, SHORT),
    Phase(3500, 256, 16, FULL),
    Phase(6000, 512, 8, FULL),
    Phase(8000, 1024, 4, FULL),
    Phase(13000, 2048, 2, FULL),
]
TOTAL_STEPS = 14000
WARMUP_STEPS = 50
DECAY_SHARE = 0.35
RATES = {"matrices": 0.01, "embedding": 0.02, "norms": 0.002}


def phase_at(step: int, phases: list[Phase]) -> Phase:
    """The phase that a step belongs to."""
    return [p for p in phases if p.start <= step][-1]


def rate_factor(step: int, total: int) -> float:
    """Share of the full learning rate: warm-up, plateau, linear decay to 2 %."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    left = (total - step) / (DECAY_SHARE * total)
    return warm * max(0.02, min(1.0, left))
