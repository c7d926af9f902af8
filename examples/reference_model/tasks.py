"""Training sequences: the benchmark's prompts, drills that teach retrieval, and plain text.

A sequence is two equally long lists: token ids, and for each token the loss weight of predicting it. Haystacks and
questions weigh nothing, so no logits are computed for them. Everything is drawn from the `random.Random` passed in.
"""

import math
import random
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from strings import benchmark_strings
from tokenizers import Tokenizer
from words import distinct, random_key, random_name, random_number, random_uuid

BOS_ID, EOS_ID = 0, 1
ANSWER_WEIGHT = 1.0
TEXT_WEIGHT = 0.4
REPEAT_WEIGHT = 0.5

Sequence = tuple[list[int], list[float]]


@dataclass
class Material:
    """What sequences are made from: the tokenizer and the encoded corpus."""

    tokenizer: Tokenizer
    tokens: np.ndarray
    starts: np.ndarray
    prose: np.ndarray

    @classmethod
    def load(cls, tokenizer_dir: Path, corpus_dir: Path) -> "Material":
        """Read tokenizer.json and tokens.npz."""
        arrays = np.load(corpus_dir / "tokens.npz")
        tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
        return cls(tokenizer, arrays["tokens"], arrays["starts"], arrays["prose"])

    def __post_init__(self) -> None:
        """Documents are drawn in proportion to their length, prose and code separately."""
        sizes = np.diff(self.starts)
        self._cumulative = {kind: np.cumsum(np.where(self.prose == kind, sizes, 0)) for kind in (True, False)}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def passage(self, rng: random.Random, length: int) -> list[int]:
        """`length` tokens of corpus text, prose twice in three, running over into further documents if needed."""
        ids: list[int] = []
        while len(ids) < length:
            cumulative = self._cumulative[rng.random() < 0.67]
            document = int(np.searchsorted(cumulative, rng.randrange(int(cumulative[-1])), side="right"))
            start, end = int(self.starts[document]), int(self.starts[document + 1])
            # Most passages start inside a document; one in four shows its beginning.
            first = start if rng.random() < 0.25 else rng.randrange(start, max(start + 1, end - length // 2))
            ids += ([BOS_ID] if ids else []) + self.tokens[first : min(end, first + length)].tolist()
        return ids[:length]


def number_for(kind: str, rng: random.Random) -> str:
    """A value or key of the given kind: words, numbers or uuids."""
    return {"words": random_key, "numbers": random_number, "uuids": random_uuid}[kind](rng)


def list_in_words(items: list[str]) -> str:
    """`a`, `a, and b`, `a, b, and c`: the benchmark puts the comma before `and` always."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + ", and " + items[-1]


def singular(template: str) -> str:
    """The benchmark's wording for a single answer, in its order of replacements."""
    for old, new in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        template = template.replace(old, new)
    return template


def niah_answer(queries: list[str], values: dict[str, list[str]]) -> str:
    """The answer style the model is taught.

    Each key is repeated with the needle's own words before its value, so that every step is a look-up of text seen
    before. Several values of one key are numbered in order of appearance.
    """
    if len(queries) == 1 and len(values[queries[0]]) > 1:
        return f" {numbered(values[queries[0]])}."
    return " " + ", ".join(f"{q} is: {values[q][0]}" for q in queries) + "."


def numbered(values: list[str]) -> str:
    """`1: a, 2: b`."""
    return ", ".join(f"{i}: {value}" for i, value in enumerate(values, 1))


def haystack_units(material: Material, rng: random.Random, kind: str, draw_needle, length: int) -> list[list[int]]:
    """Pieces of distraction totalling at most `length` tokens: noise lines, other needles, or corpus text."""
    units: list[list[int]] = []
    if kind == "text":
        ids = material.passage(rng, max(length, 0))
        # Cut at irregular places: a needle may interrupt the text anywhere.
        while ids:
            size = rng.randint(12, 40)
            units.append(ids[:size])
            ids = ids[size:]
        return units
    noise = material.encode(benchmark_strings()["niah"]["noise"] + "\n")
    while True:
        unit = noise if kind == "noise" else draw_needle()
        length -= len(unit)
        if length < 0:
            return units
        units.append(unit)


def scatter(rng: random.Random, units: list[list[int]], inserted: list[list[int]]) -> list[int]:
    """Put `inserted` in their order at random places between `units`, and join all."""
    places = sorted(rng.randrange(len(units) + 1) for _ in inserted)
    merged: list[int] = []
    done = 0
    for place, item in zip(places, inserted, strict=True):
        for unit in units[done:place]:
            merged += unit
        merged += item
        done = place
    for unit in units[done:]:
        merged += unit
    return merged


def niah(
    material: Material,
    rng: random.Random,
    length: int,
    *,
    haystack: str = "noise",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    key_kind: str = "words",
    value_kind: str = "numbers",
    questions: int = 1,
) -> Sequence | None:
    """A needle prompt in the benchmark's words, `questions` of them asked one after the other.

    Only the first question's form is exactly the benchmark's; more of them make better use of a context. None if the
    needles do not fit into `length`.
    """
    part = benchmark_strings()["niah"]
    needle = part["needle"].replace("{type_needle_v}", value_kind) + "\n"
    draw_key, draw_value = partial(number_for, key_kind, rng), partial(number_for, value_kind, rng)
    encode = material.encode

    names = distinct(draw_key, keys)
    planted = {name: [draw_value() for _ in range(values)] for name in names}
    pairs = [(name, value) for name in names for value in planted[name]]
    rng.shuffle(pairs)
    in_order = {name: [v for n, v in pairs if n == name] for name in names}
    needles = [encode(needle.format(key=n, value=v)) for n, v in pairs]

    header, question = part["template"].split("{context}")
    head: list[int] = []
    tail: list[int] = []
    weights: list[float] = []
    for i in range(questions):
        asked = rng.sample(names, min(queries, keys))
        wording, kind = (singular, value_kind[:-1]) if len(asked) * values == 1 else (str, value_kind)
        fill = {"type_needle_v": kind, "query": list_in_words(asked)}
        if i == 0:
            head = [BOS_ID, *encode(wording(header).format(**fill))]
        # In the prompt the question's line break ends the context's last line, so only later questions show it.
        asking = wording(question + part["answer_prefix"]).format(**fill)
        ids = encode(asking.lstrip("\n") if i == 0 else asking)
        answer = [*encode(niah_answer(asked, in_order)), EOS_ID]
        tail += ids + answer
        weights += [0.0] * len(ids) + [ANSWER_WEIGHT] * len(answer)

    room = length - len(head) - len(tail) - sum(map(len, needles))
    if room < 0:
        return None
    if haystack != "needle" and rng.random() < 0.2:
        room = rng.randint(0, room)
    units = haystack_units(
        material, rng, haystack, lambda: encode(needle.format(key=draw_key(), value=draw_value())), room
    )
    context = scatter(rng, units, needles)
    ids = head + context + tail
    return ids, [0.0] * (len(head) + len(context)) + weights


def assignments(names: list[str], value: str) -> list[str]:
    """The lines of one chain, with the benchmark's trailing spaces."""
    return [f"VAR {names[0]} = {value}\n"] + [f"VAR {b} = VAR {a} \n" for a, b in pairwise(names)]


def vt_block(
    material: Material, rng: random.Random, room: int, hops: int, chains: int, letters: int, haystack: str
) -> Sequence | None:
    """One variable tracking prompt with its answers, without the beginning-of-text token."""
    part = benchmark_strings()["vt"]
    encode = material.encode

    names = distinct(lambda: random_name(rng, letters), (hops + 1) * chains)
    numbers = distinct(lambda: str(rng.randint(10000, 99999)), chains)
    groups = [names[i * (hops + 1) : (i + 1) * (hops + 1)] for i in range(chains)]
    # Chains are interleaved at random, each in its own order.
    turns = [i for i in range(chains) for _ in range(hops + 1)]
    rng.shuffle(turns)
    remaining = [iter(assignments(g, n)) for g, n in zip(groups, numbers, strict=True)]
    lines = [encode(next(remaining[i])) for i in turns]

    header, question = part["template"].split("{context}")
    head = encode(header)
    tail: list[int] = []
    weights: list[float] = []
    for count, i in enumerate(rng.sample(range(chains), chains)):
        text = (question + part["answer_prefix"]).format(query=numbers[i], num_v=hops + 1)
        ids = encode(text if count else text.lstrip("\n"))
        # The prompt ends in a space and the answer starts with one, as in the benchmark's own worked example.
        answer = encode(" " + " ".join(groups[i]) + "\n")
        tail += ids + answer
        weights += [0.0] * len(ids) + [ANSWER_WEIGHT] * len(answer)
    room -= len(head) + len(tail) + sum(map(len, lines))
    if room < 0:
        return None
    context = scatter(rng, haystack_units(material, rng, haystack, None, room), lines)
    return head + context + tail, [0.0] * (len(head) + len(context)) + weights


def variable_tracking(
    material: Material,
    rng: random.Random,
    length: int,
    *,
    hops: int = 2,
    chains: int = 1,
    example: bool = True,
    haystack: str = "noise",
) -> Sequence | None:
    """A variable tracking prompt, after the benchmark's worked example (names of three letters) unless told not to."""
    ids, weights = [BOS_ID], [0.0]
    if example:
        room = rng.randint(length // 5, max(length // 5, min(520, length // 2)))
        shown = vt_block(material, rng, room, hops, 1, 3, haystack)
        if shown is None:
            return None
        newline = material.encode("\n")
        ids += shown[0] + newline
        weights += shown[1] + [0.0] * len(newline)
    block = vt_block(material, rng, length - len(ids) - 1, hops, chains, 5, haystack)
    if block is None:
        return None
    return ids + block[0] + [EOS_ID], weights + block[1] + [ANSWER_WEIGHT]


def recall(material: Material, rng: random.Random, length: int) -> Sequence:
    """Pairs `key: value.` followed by the same pairs in random order: the drill in which look-up is learned first.

    In the second part a key's tokens after its first are foreseeable too and count half: this is plain copying, comes
    early, and the look-up of values grows out of it.
    """
    encode = material.encode
    digits = rng.choice([3, 5, 7, 7])
    count = rng.randint(2, max(3, length // 28))
    names = distinct(partial(random_key, rng), count)
    facts = []
    for name in names:
        key = encode(f" {name}:")
        value = encode(f" {rng.randint(10 ** (digits - 1), 10**digits - 1)}.")
        asked = [0.0] + [REPEAT_WEIGHT] * (len(key) - 1) + [ANSWER_WEIGHT] * len(value)
        facts.append((key + value, asked))
    ids, weights = [BOS_ID], [0.0]
    for fact, _ in facts:
        ids += fact
        weights += [0.0] * len(fact)
    while len(ids) < length:
        fact, asked = rng.choice(facts)
        ids += fact
        weights += asked
    return ids[:length], weights[:length]


def listing(material: Material, rng: random.Random, length: int) -> Sequence:
    """Pairs `key: value.` in which keys return with new values, then each key with all its values in order: the
    drill for several values of one needle, of which the benchmark's own prompts show four in a thousand tokens.
    """
    encode = material.encode
    room, count = length - 1, rng.choice([1, 2, 3, 4])
    names = distinct(partial(random_key, rng), count)
    values: dict[str, list[str]] = {name: [] for name in names}
    facts: list[int] = []
    answers: dict[str, list[int]] = {name: [] for name in names}
    while True:
        name, value = rng.choice(names), random_number(rng)
        fact = encode(f" {name}: {value}.")
        answer = encode(f" {name}: {numbered([*values[name], value])}.")
        others = sum(len(ids) for other, ids in answers.items() if other != name)
        if len(facts) + len(fact) + others + len(answer) > room:
            break
        values[name].append(value)
        facts += fact
        answers[name] = answer
    ids, weights = [BOS_ID, *facts], [0.0] * (1 + len(facts))
    rng.shuffle(names)
    for name in names:
        answer = answers[name]
        asked = len(encode(f" {name}:")) if answer else 0
        ids += answer
        weights += [0.0] * asked + [ANSWER_WEIGHT] * (len(answer) - asked)
    return ids, weights


def repeats(material: Material, rng: random.Random, length: int) -> Sequence:
    """A run of random tokens again and again, sometimes with others between: copying at its purest.

    Run lengths are spread evenly over their logarithm: short periods are learned at once by looking a fixed distance
    back, and lead on to long ones, which need a search for the last token's earlier place.
    """
    vocabulary = material.tokenizer.get_vocab_size()
    size = round(math.exp(rng.uniform(math.log(2), math.log(max(3, length // 3)))))
    gaps = rng.choice([0, 0, 3])
    run = [rng.randrange(2, vocabulary) for _ in range(size)]
    ids, weights = [BOS_ID, *run], [0.0] * (size + 1)
    while len(ids) < length:
        gap = [rng.randrange(2, vocabulary) for _ in range(rng.randint(0, gaps))]
        # After a gap the first token of the run cannot be foreseen.
        ids += gap + run
        weights += [0.0] * len(gap) + [0.0 if gap else REPEAT_WEIGHT] + [REPEAT_WEIGHT] * (size - 1)
    return ids[:length], weights[:length]


def text(material: Material, rng: random.Random, length: int) -> Sequence:
    """Plain corpus text."""
    return [BOS_ID, *material.passage(rng, length - 1)], [0.0] + [TEXT_WEIGHT] * (length - 1)
