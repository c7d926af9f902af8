"""The noise floor: how far two scores of one model lie apart when only the prompts were drawn anew.

The baseline runs every task a second time with the prompts of the next seed. The two runs share no prompt, so nothing
pairs up: their difference is what a comparison of two published scores, each measured with its own prompts, cannot see
below. The differences between models in this report are paired, on the same prompts, and free of it; decoding is greedy
and adds no noise of its own.
"""

from __future__ import annotations

from typing import Any

from kvcompress_eval.records import Records
from kvcompress_eval.scores import equal_weights, flat, unit_scores
from kvcompress_eval.statistics import independent_interval
from kvcompress_eval.work import Work


def noise_floor(first: Records, work: Work, second: Records, again: Work, seed: int) -> dict[str, Any]:
    """Differences between two seeds, in points: overall with a 95 % interval, per task, and their root mean square.

    Tasks that could be made with one seed only are left out; empty if none is left.
    """
    made = {(unit.task, unit.length): index for index, unit in enumerate(again.units)}
    pairs = [
        (unit, unit_scores(first, index, unit), unit_scores(second, other, again.units[other]))
        for index, unit in enumerate(work.units)
        if (other := made.get((unit.task, unit.length))) is not None
    ]
    if not pairs:
        return {}
    tasks = [
        {"task": unit.task, "length": unit.length, **_pair(unit.points(one), unit.points(two))}
        for unit, one, two in pairs
    ]
    ones, twos = [one for _, one, _ in pairs], [two for _, _, two in pairs]
    low, high = independent_interval(flat(ones), flat(twos), (equal_weights(ones), equal_weights(twos)))
    means = [sum(sum(scores) / len(scores) for scores in side) / len(side) for side in (ones, twos)]
    return {
        "model": first.model.name,
        "seeds": [seed, seed + 1],
        "overall": {**_pair(*(round(100 * mean, 2) for mean in means)), "ci95": [100 * low, 100 * high]},
        "rms": (sum(row["delta"] ** 2 for row in tasks) / len(tasks)) ** 0.5,
        "tasks": tasks,
    }


def _pair(one: float, two: float) -> dict[str, Any]:
    return {"scores": [one, two], "delta": round(two - one, 2)}
