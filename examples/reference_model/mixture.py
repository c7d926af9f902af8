"""Which sequences a training step sees: named tasks with shares, by phase."""

import random
from collections.abc import Callable

import numpy as np
import tasks
from tasks import Material, Sequence

Maker = Callable[[Material, random.Random, int], Sequence | None]


def room_for(length: int, small: int, large: int) -> int:
    """More needles in longer contexts: `small` below 384 tokens, `large` from there on."""
    return small if length < 384 else large


def single(material: Material, rng: random.Random, length: int) -> Sequence | None:
    """niah_single_1: one key, one number."""
    return tasks.niah(material, rng, length)


def multikey(material: Material, rng: random.Random, length: int) -> Sequence | None:
    """Several keys, some of them asked for one by one."""
    keys = rng.randint(2, room_for(length, 4, 8))
    haystack = rng.choices(["noise", "text"], [0.75, 0.25])[0]
    return tasks.niah(material, rng, length, haystack=haystack, keys=keys, questions=rng.randint(1, keys))


def multivalue(material: Material, rng: random.Random, length: int) -> Sequence | None:
    """One key with several values: the benchmark's four, seldom fewer; at times two such keys, asked for in turn."""
    keys = 2 if length >= 384 and rng.random() < 0.06 else 1
    values = rng.choice([2, 3, 4, 4, 4, 4, 4, 4, 4, 4]) if length >= 256 else rng.choice([2, 2, 3])
    haystack = rng.choices(["noise", "text"], [0.9, 0.1])[0]
    return tasks.niah(material, rng, length, haystack=haystack, keys=keys, values=values, questions=keys)


def multiquery(material: Material, rng: random.Random, length: int) -> Sequence | None:
    """Several keys asked for in one question: the benchmark's four of four, seldom others."""
    keys = rng.randint(2, room_for(length, 4, 6)) if rng.random() < 0.3 or length < 256 else 4
    queries = rng.randint(2, keys) if rng.random() < 0.3 else min(keys, 4)
    haystack = rng.choices(["noise", "text"], [0.85, 0.15])[0]
    return tasks.niah(material, rng, length, haystack=haystack, keys=keys, queries=queries)


def needles(material: Material, rng: random.Random, length: int) -> Sequence | None:
    """niah_multikey_2: a haystack of needles, several of which are asked for."""
    keys = rng.randint(1, room_for(length, 3, 8))
    return tasks.niah(material, rng, length, haystack="needle", keys=keys, questions=rng.randint(1, keys))


def uuids(material: Material, rng: random.Random, length: int) -> Sequence | None:
    """niah_multikey_3: keys and values are uuids."""
    keys = rng.randint(1, room_for(length, 1, 3))
    haystack = rng.choice(["needle", "needle", "noise"])
    kinds = {"key_kind": rng.choice(["uuids", "uuids", "words"]), "value_kind": "uuids"}
    return tasks.niah(material, rng, length, haystack=haystack, keys=keys, questions=rng.randint(1, keys), **kinds)


def tracking(material: Material, rng: random.Random, length: int) -> Sequence | None:
    """vt: one chain in noise after the worked example, as in the benchmark."""
    return tasks.variable_tracking(material, rng, length, hops=rng.choice([1, 2, 2, 3, 4, 4]), example=length >= 384)


def tracking_drill(material: Material, rng: random.Random, length: int) -> Sequence | None:
    """Several chains without the example: the names must really be followed."""
    hops = rng.randint(1, room_for(length, 2, 4))
    chains = rng.randint(1, 3)
    haystack = rng.choices(["noise", "text"], [0.8, 0.2])[0]
    return tasks.variable_tracking(material, rng, length, hops=hops, chains=chains, example=False, haystack=haystack)


TASKS: dict[str, Maker] = {
    "recall": tasks.recall,
    "repeats": tasks.repeats,
    "listing": tasks.listing,
    "text": tasks.text,
    "single": single,
    "multikey": multikey,
    "multivalue": multivalue,
    "multiquery": multiquery,
    "needles": needles,
    "uuids": uuids,
    "tracking": tracking,
    "tracking_drill": tracking_drill,
}
NAMES = list(TASKS)


def make_batch(
    material: Material, seed: int, step: int, rows: int, length: int, shares: dict[str, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The batch of one step: ids [rows, length], weights alike, and each row's index into NAMES.

    It depends on nothing but the arguments, so a resumed run continues with the same stream. Rows shorter than
    `length` are padded at the end with weight 0. A task that does not fit the length is replaced by the recall drill.
    """
    rng = random.Random(f"{seed}/{step}")
    ids = np.zeros((rows, length), dtype=np.int64)
    weights = np.zeros((rows, length), dtype=np.float32)
    kinds = np.zeros(rows, dtype=np.int64)
    for row in range(rows):
        name = rng.choices(list(shares), list(shares.values()))[0]
        sequence = TASKS[name](material, rng, length)
        if sequence is None:
            name, sequence = "recall", tasks.recall(material, rng, length)
        count = len(sequence[0])
        ids[row, :count], weights[row, :count] = sequence
        kinds[row] = NAMES.index(name)
    return ids, weights, kinds
