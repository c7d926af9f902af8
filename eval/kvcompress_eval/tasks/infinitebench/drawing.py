"""Drawing the contexts of InfiniteBench's generated tasks, as large as wanted.

passkey, number_string and kv_retrieval follow the published generator; each sample draws its own place for the needle
where the published sets step through a grid. The generators of math_find and code_run were not published: theirs follow
the paper's description (appendix, arXiv 2402.13718), and the tasks carry `_syn` in their names.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from random import Random

from kvcompress_eval.tasks.infinitebench.templates import template

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"

RANKS = (
    ("the largest number", -1),
    ("the second largest number", -2),
    ("the third largest number", -3),
    ("the smallest number", 0),
    ("the second smallest number", 1),
    ("the third smallest number", 2),
    ("the median number", None),
)
CALL_DEPTH = (2, 10)
LARGEST_TERM = 9
LARGEST_ARGUMENT = 99


@dataclass(frozen=True)
class Drawn:
    """A prompt, the words that begin the answer, and the answer."""

    prompt: str
    answer_prefix: str
    answer: str
    depth: float | None = None
    """Percent of the context before the answer."""


def passkey(random: Random, lines: int) -> Drawn:
    """Five random digits in `lines` lines of noise."""
    return _in_noise("passkey", random, lines, "".join(str(random.randint(0, 9)) for _ in range(5)))


def number_string(random: Random, lines: int) -> Drawn:
    """Ten digits with runs in them: five random ones, then five times one of them is doubled."""
    digits = [str(random.randint(0, 9)) for _ in range(5)]
    for made in range(5):
        at = random.randint(0, 4 + made)
        digits.insert(at, digits[at])
    return _in_noise("number_string", random, lines, "".join(digits))


def _in_noise(task: str, random: Random, lines: int, key: str) -> Drawn:
    parts = template(task)
    before = random.randint(0, lines)
    context = NOISE * before + parts.needle.format(key=key) + NOISE * (lines - before)
    # The published contexts end in the newline of their last line.
    return Drawn(parts.prompt.format(context=context), parts.answer_prefix, key, 100 * before / max(lines, 1))


def kv_retrieval(random: Random, pairs: int) -> Drawn:
    """One JSON object of `pairs + 1` random uuids, one of whose values is asked for."""
    entries = [(_uuid(random), _uuid(random)) for _ in range(pairs + 1)]
    at = random.randrange(len(entries))
    parts = template("kv_retrieval")
    prompt = parts.prompt.format(context=json.dumps(dict(entries)), key=entries[at][0])
    return Drawn(prompt, parts.answer_prefix, entries[at][1], 100 * at / max(pairs, 1))


def _uuid(random: Random) -> str:
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


def math_find(random: Random, numbers: int) -> Drawn:
    """A list of numbers, of which one is asked for by its rank among the distinct ones, or the median."""
    # Bounds of its own for each list: between fixed ones, the largest of a long list would always be the same.
    low, high = random.randint(0, 400), random.randint(600, 999)
    drawn = [random.randint(low, high) for _ in range(2 * numbers + 5)]
    target, rank = random.choice(RANKS)
    distinct = sorted(set(drawn))
    if rank is None or len(distinct) < 3:
        target, answer = "the median number", sorted(drawn)[len(drawn) // 2]
    else:
        answer = distinct[rank]
    parts = template("math_find")
    sentence = f"{target[0].upper()}{target[1:]} of the list is:"
    return Drawn(
        parts.prompt.format(target=target, context=json.dumps(drawn)),
        parts.answer_prefix.format(sentence=sentence),
        str(answer),
    )


def code_run(random: Random, functions: int) -> Drawn:
    """Functions that add or subtract and call one another; the value of one call is asked for."""
    total = functions + CALL_DEPTH[1]
    names = [f"func_{number}" for number in random.sample(range(10 * total), total)]
    depth = random.randint(*CALL_DEPTH)
    # The asked chain, then bystanders that call into it or into one another, later ones only: every call ends.
    terms = [random.choice((-1, 1)) * random.randint(0, LARGEST_TERM) for _ in range(total)]
    callees: list[str | None] = [names[at + 1] if at + 1 < depth else None for at in range(depth)]
    picked = (random.randint(at + 1, total) for at in range(depth, total))
    callees += [names[at] if at < total else None for at in picked]
    bodies = [_function(*parts) for parts in zip(names, callees, terms, strict=True)]
    random.shuffle(bodies)
    value = random.randint(-LARGEST_ARGUMENT, LARGEST_ARGUMENT)
    call = f"{names[0]}({value})"
    parts = template("code_run")
    return Drawn(
        parts.prompt.format(function=names[0], context="\n".join(bodies), call=call),
        parts.answer_prefix.format(call=call),
        str(value + sum(terms[:depth])),
    )


def _function(name: str, callee: str | None, term: int) -> str:
    value = "x" if callee is None else f"{callee}(x)"
    return f"def {name}(x):\n    return {value} {'-' if term < 0 else '+'} {abs(term)}\n"
