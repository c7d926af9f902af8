"""Words, numbers and uuids that the tasks are made of, as the benchmark draws them."""

import random
import string
import uuid
from functools import cache
from importlib.resources import files


@cache
def key_words() -> tuple[list[str], list[str]]:
    """Adjectives and nouns of the wonderwords package, whose pairs are the benchmark's word keys."""
    lists = []
    for name in ("adjectivelist.txt", "nounlist.txt"):
        text = (files("wonderwords") / "assets" / name).read_text("utf-8")
        lists.append([line.rstrip() for line in text.splitlines() if line.strip()])
    return lists[0], lists[1]


def random_key(rng: random.Random) -> str:
    """One of the 6.2 million adjective-noun keys."""
    adjectives, nouns = key_words()
    return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


def random_number(rng: random.Random) -> str:
    """A number of seven digits."""
    return str(rng.randint(10**6, 10**7 - 1))


def random_uuid(rng: random.Random) -> str:
    """A version 4 uuid."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def random_name(rng: random.Random, length: int) -> str:
    """A variable name of upper-case letters."""
    return "".join(rng.choices(string.ascii_uppercase, k=length))


def distinct(make, count: int) -> list[str]:
    """`count` different values of the zero-argument callable `make`, in drawing order."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)
