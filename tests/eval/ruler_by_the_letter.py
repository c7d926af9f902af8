"""A second implementation of RULER's tasks, written from the specification sentence by sentence.

It shares nothing with the product but the strings: it seeds Python's and numpy's global generators as the benchmark
does, holds all word keys in one list, and keeps no state in objects. Slow and plain on purpose.
"""

from __future__ import annotations

import json
import random
import re
import string
import uuid
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.special import zeta

STRINGS = yaml.safe_load(
    (Path(__file__).parents[2] / "eval/kvcompress_eval/tasks/ruler/strings.yaml").read_text("utf-8")
)
Rows = list[dict[str, Any]]
Tokens = Callable[[str], int]


@cache
def lines(kind: str) -> list[str]:
    with (files("wonderwords") / "assets" / f"{kind}list.txt").open(encoding="utf-8") as file:
        return [line.rstrip() for line in file.readlines()]


@cache
def all_keys() -> list[str]:
    return sorted({f"{adjective}-{noun}" for adjective in lines("adjective") for noun in lines("noun")})


class TooShort(Exception):
    """No sample fits, however often it is drawn."""


def prompt_template(family: str, around: tuple[str, str]) -> str:
    """The model template applied to the task's, then the answer prefix."""
    return around[0] + STRINGS[family]["template"] + around[1] + STRINGS[family]["answer_prefix"]


def shuffled(seed: int, items: list[str]) -> list[str]:
    """With a generator of its own."""
    copy = list(items)
    random.Random(seed).shuffle(copy)
    return copy


def row(index: int, prompt: str, outputs: list[str], raw_prefix: str, length: int) -> dict[str, Any]:
    at = prompt.rfind(raw_prefix[:10])
    return {"index": index, "input": prompt[:at], "outputs": outputs, "answer_prefix": prompt[at:], "length": length}


def best_size(make: Callable[[int], int], inc: int, upper: int) -> int:
    """`make` returns the tokens over the limit, zero or less when the sample fits."""
    low, best = inc, None
    while low <= upper:
        mid = (low + upper) // 2
        if make(mid) <= 0:
            best, low = mid, mid + 1
        else:
            upper = mid - 1
    return inc if best is None else best


def draw_until_it_fits(
    make: Callable[[int], tuple[str, list[str]]], tokens: Tokens, n: int, inc: int, limit: int
) -> tuple[str, list[str], int]:
    """Draw at n, smaller by inc after each miss; at inc and below, again and again."""
    for _ in range(200 + n // inc):
        try:
            prompt, answers = make(n)
            if tokens(prompt) <= limit:
                return prompt, answers, tokens(prompt)
        except IndexError:
            pass  # nothing came of this draw: a miss like any other
        if n > inc:
            n -= inc
    raise TooShort


# --- needle in a haystack -------------------------------------------------------------------------------------------


def sentences_of(text: str) -> list[str]:
    """Cut at spaces after a full stop, a question or an exclamation mark, which quotes and brackets may follow."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"')\]\u2019\u201d]*(?= )", text)]
    starts = [0, *[end + 1 for end in ends]]
    return [text[start:end] for start, end in zip(starts, [*ends, len(text)], strict=True)]


def niah(
    tokens: Tokens,
    length: int,
    count: int,
    seed: int,
    haystack: str,
    type_k: str,
    type_v: str,
    k: int,
    v: int,
    q: int,
    essay: str = "",
    around: tuple[str, str] = ("", ""),
) -> Rows:
    random.seed(seed)
    np.random.seed(seed)
    text, generated, k = STRINGS["niah"], 128, max(k, q)
    essay_words = re.sub(r"\s+", " ", essay).split(" ")
    depths = list(np.round(np.linspace(0, 100, num=40)).astype(int))

    def a_random(kind: str) -> str:
        if kind == "words":
            return random.choice(all_keys())
        if kind == "numbers":
            return str(random.randint(1_000_000, 9_999_999))
        return str(uuid.UUID(int=random.getrandbits(128), version=4))

    def needle(key: str, value: str) -> str:
        return text["needle"].replace("{type_needle_v}", type_v).replace("{key}", key).replace("{value}", value)

    def in_lines(n: int, needles: list[str]) -> str:
        context = []
        for _ in range(n):
            if haystack == "noise":
                context.append(text["noise"])
            else:
                key = a_random(type_k)
                context.append(needle(key, a_random(type_v)))
        places = random.sample(range(n), len(needles))
        places.sort()
        places.reverse()
        for place, item in zip(places, needles, strict=True):
            context[place:place] = [item]
        return "\n".join(context)

    def in_essay(n: int, needles: list[str]) -> str:
        words = []
        while len(words) < n:
            words += essay_words
        found = sentences_of(" ".join(words[:n]).strip())
        places = sorted([int(len(found) * (depth / 100)) for depth in random.sample(depths, len(needles))])
        out, last = [], 0
        for place, item in zip(places, needles, strict=True):
            out += [" ".join(found[last:place]), item]
            last = place
        return " ".join([*out, " ".join(found[last:])])

    def sample(n: int) -> tuple[str, list[str]]:
        table: list[tuple[str, list[str]]] = []
        needles = []
        for _ in range(k):
            key, values = a_random(type_k), []
            for _ in range(v):
                values.append(a_random(type_v))
                needles.append(needle(key, values[-1]))
            table.append((key, values))
        needles = shuffled(seed, needles)
        body = in_essay(n, needles) if haystack == "essay" else in_lines(n, needles)
        chosen = [table[i] for i in random.sample(range(k), q)]
        names = [key for key, _ in chosen]
        query = names[0]
        if q > 1:
            query = ", ".join(names[:-1]) + ", and " + names[-1]
        prompt, kind = prompt_template("niah", around), type_v
        if q * v == 1:
            prompt = prompt.replace("Some", "A").replace("are all", "is").replace("are", "is")
            prompt = prompt.replace("answers", "answer")
            kind = {"numbers": "number", "words": "word", "uuids": "uuid"}[type_v]
        prompt = prompt.replace("{type_needle_v}", kind).replace("{query}", query)
        return prompt.replace("{context}", body), [value for _, values in chosen for value in values]

    inc = 500 if haystack == "essay" else 5 if length < 4096 else 25
    per_unit = tokens(sample(inc)[0]) / inc
    size = best_size(lambda n: tokens(sample(n)[0]) + generated - length, inc, max(int(length / per_unit * 3), 2 * inc))
    rows: Rows = []
    for index in range(count):
        prompt, answers, used = draw_until_it_fits(sample, tokens, size, inc, length - generated)
        rows.append(row(index, prompt, answers, text["answer_prefix"], used + generated))
    return rows


# --- variable tracking ----------------------------------------------------------------------------------------------


def vt(
    tokens: Tokens,
    length: int,
    count: int,
    seed: int,
    chains: int = 1,
    hops: int = 4,
    around: tuple[str, str] = ("", ""),
) -> Rows:
    random.seed(seed)
    np.random.seed(seed)
    text, generated = STRINGS["vt"], 30
    noise = STRINGS["niah"]["noise"]

    def name(letters: int) -> str:
        return "".join(random.choices(string.ascii_uppercase, k=letters))

    def sample(n: int, example: bool) -> tuple[str, list[str]]:
        links = (min(10, hops) if example else hops) + 1
        names = [name(3 if example else 5) for _ in range(links * chains)]
        while len(set(names)) < links * chains:
            names += [name(3 if example else 5)]
        statements, first_value = [], ""
        # Every name has its place in a chain, those that were drawn because others came twice, too: then the last
        # chain has too few, and asking for its next name is an IndexError.
        for first in range(0, len(names), links):
            mine = names[first : first + links]
            value = "12345" if example else str(np.random.randint(10000, 99999))
            first_value = first_value or value
            rest = [f"VAR {mine[i]} = VAR {mine[i - 1]} " for i in range(1, links)]
            statements.append([f"VAR {mine[0]} = {value}", *rest])
        context = [noise] * n
        for chain in statements:
            places = sorted(random.sample(range(len(context)), len(chain)))
            for j in range(len(chain)):
                context.insert(places[j] + j, chain[j])
        body = "\n".join(context).replace(". \n", ".\n")
        prompt = prompt_template("vt", ("", "") if example else around).replace("{num_v}", str(hops + 1))
        return prompt.replace("{query}", first_value).replace("{context}", body), names[:links]

    def counted(m: int, example: bool) -> int:
        """Tokens of a draw, in the estimate and the search: an unlucky one ends the benchmark; we draw once more."""
        while True:
            try:
                return tokens(sample(m, example)[0])
            except IndexError:
                continue

    # The in-context example: the same routine, one sample, at most 500 tokens, nothing generated, inc 5.
    per_unit = counted(5, True) / 5
    n = best_size(lambda m: counted(m, True) - 500, 5, max(int(500 / per_unit * 3), 10))
    prompt, answers, _ = draw_until_it_fits(lambda m: sample(m, True), tokens, n, 5, 500)
    shown = prompt + " " + " ".join(answers) + "\n"
    shown_tokens = tokens(shown)

    inc = 5 if length < 4096 else 10
    per_unit = counted(inc, False) / inc
    size = best_size(
        lambda m: counted(m, False) + shown_tokens + generated - length,
        inc,
        max(int(length / per_unit * 3), 2 * inc),
    )

    def shown_and_sample(m: int) -> tuple[str, list[str]]:
        prompt, answers = sample(m, False)
        renewed = shown
        for old in shown.split()[-(hops + 1) :]:
            renewed = renewed.replace(old, name(len(old)))
        renewed = renewed.replace("12345", str(np.random.randint(10000, 99999)))
        start = prompt.find(text["template"][:20])
        return prompt[:start] + renewed + "\n" + prompt[start:], answers

    rows: Rows = []
    for index in range(count):
        joined, answers, used = draw_until_it_fits(shown_and_sample, tokens, size, inc, length - generated)
        rows.append(row(index, joined, answers, text["answer_prefix"], used + generated))
    return rows


# --- common words extraction ----------------------------------------------------------------------------------------


def cwe(tokens: Tokens, length: int, count: int, seed: int, around: tuple[str, str] = ("", "")) -> Rows:
    random.seed(seed)
    text, generated = STRINGS["cwe"], 120
    pool = shuffled(seed, sorted(set(lines("noun") + lines("adjective") + lines("verb"))))

    def numbered(words: list[str]) -> str:
        out = []
        for i in range(len(words)):
            out.append(f"{i + 1}. {words[i]}")
        return " ".join(out)

    def word_list(n: int, frequent: int, rare: int) -> tuple[str, list[str]]:
        drawn = random.sample(pool, n)
        repeated = []
        for _ in range(frequent):
            repeated += drawn[:10]
        for _ in range(rare):
            repeated += drawn[10:]
        return numbered(shuffled(seed, repeated)), drawn[:10]

    def sample(n: int) -> tuple[str, list[str]]:
        if length < 4096:
            example, solved = word_list(20, 3, 1)
            main, answers = word_list(n, 6, 1)
        else:
            example, solved = word_list(40, 10, 3)
            main, answers = word_list(n, 30, 3)
        prompt = prompt_template("cwe", around)
        head = prompt.replace("{context}", example) + " " + numbered(solved) + "\n"
        return head + prompt.replace("{context}", main), answers

    per_word = tokens(sample(4096)[0]) / 4096
    size = best_size(lambda n: tokens(sample(n)[0]) + generated - length, 10, max(int(length // per_word) * 2, 20))
    rows: Rows = []
    for index in range(count):
        prompt, answers, used = draw_until_it_fits(sample, tokens, size, 10, length - generated)
        rows.append(row(index, prompt, answers, text["answer_prefix"], used + generated))
    return rows


# --- frequent words extraction --------------------------------------------------------------------------------------


def fwe(tokens: Tokens, length: int, count: int, seed: int, around: tuple[str, str] = ("", "")) -> Rows:
    random.seed(seed)
    np.random.seed(seed)
    text, generated = STRINGS["fwe"], 50
    room = length - generated
    size = room // 50

    def vocabulary() -> list[str]:
        found = ["".join(random.choices(string.ascii_lowercase, k=6)) for _ in range(size)]
        while len(set(found)) < size:
            found.append("".join(random.choices(string.ascii_lowercase, k=6)))
        ranked = shuffled(seed, sorted(set(found)))
        return ["...", *ranked[1:]]

    def prompt_of(ranked: list[str], n: int) -> str:
        coded: list[str] = []
        for rank, word in enumerate(ranked, start=1):
            coded += [word] * int(n * float(rank) ** -2.0 / zeta(2.0))
        return prompt_template("fwe", around).replace("{context}", " ".join(shuffled(seed, coded)))

    ranked, n = vocabulary(), room // 6
    while tokens(prompt_of(ranked, n)) < room:
        n += room // 32
    n -= room // 32
    rows: Rows = []
    for index in range(count):
        ranked, mine = vocabulary(), n
        while tokens(prompt_of(ranked, mine)) > room:
            mine -= room // 32
        prompt = prompt_of(ranked, mine)
        rows.append(row(index, prompt, ranked[1:4], text["answer_prefix"], tokens(prompt) + generated))
    return rows


# --- questions --------------------------------------------------------------------------------------------------------


def read_squad(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    data = json.loads(path.read_text("utf-8"))["data"]
    documents = sorted({paragraph["context"] for article in data for paragraph in article["paragraphs"]})
    questions = []
    for article in data:
        for paragraph in article["paragraphs"]:
            mine = documents.index(paragraph["context"])
            article_places = [documents.index(other["context"]) for other in article["paragraphs"]]
            for qa in paragraph["qas"]:
                if qa["is_impossible"]:
                    continue
                answers = [answer["text"] for answer in qa["answers"]]
                more = [place for place in article_places if place != mine]
                questions.append({"query": qa["question"], "outputs": answers, "own": [mine], "more": more})
    return questions, documents


def read_hotpotqa(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    data = json.loads(path.read_text("utf-8"))

    def document(title: str, lines: list[str]) -> str:
        return title + "\n" + "".join(lines)

    documents = sorted({document(*entry) for item in data for entry in item["context"]})
    questions = []
    for item in data:
        own = [documents.index(document(*entry)) for entry in item["context"]]
        questions.append({"query": item["question"], "outputs": [item["answer"]], "own": own, "more": []})
    return questions, documents


def qa(
    tokens: Tokens,
    length: int,
    count: int,
    seed: int,
    data: tuple[list[dict[str, Any]], list[str]],
    around: tuple[str, str] = ("", ""),
) -> Rows:
    random.seed(seed)
    text, generated = STRINGS["qa"], 32
    questions, documents = data

    def sample(index: int, n: int) -> tuple[str, list[str]]:
        question = questions[index]
        own, more = question["own"], question["more"]
        if n >= len(documents):
            shown = []
            while len(shown) < n:
                shown += documents
            shown = shown[:n]
        else:
            if n - len(own) > len(more):
                rest = [place for place in range(len(documents)) if place not in own and place not in more]
                places = own + more + random.sample(rest, n - len(own) - len(more))
            else:
                places = own + random.sample(more, n - len(own))
            shown = [documents[place] for place in places]
        context = "\n\n".join(f"Document {i + 1}:\n{body}" for i, body in enumerate(shuffled(seed, shown)))
        prompt = prompt_template("qa", around).replace("{query}", question["query"])
        return prompt.replace("{context}", context), question["outputs"]

    per_document = tokens(sample(0, 10)[0]) / 10
    upper = max(int(length / per_document * 3), 20)
    size = best_size(lambda n: tokens(sample(0, n)[0]) + generated - length, 10, upper)
    rows: Rows = []
    for index in range(count):
        prompt, answers, used = draw_until_it_fits(
            lambda n, at=index: sample(at, n), tokens, size, 10, length - generated
        )
        rows.append(row(index, prompt, answers, text["answer_prefix"], used + generated))
    return rows


def task(
    name: str,
    tokens: Tokens,
    length: int,
    count: int,
    seed: int,
    around: tuple[str, str] = ("", ""),
    essay: str = "",
    squad: Path | None = None,
    hotpotqa: Path | None = None,
) -> Rows:
    """A task by name, with the parameters of the specification's table."""
    asked = (tokens, length, count, seed)
    words_to_numbers = ("words", "numbers")
    lines = {
        "niah_single_1": ("noise", *words_to_numbers, 1, 1, 1),
        "niah_multikey_2": ("needle", *words_to_numbers, 1, 1, 1),
        "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
        "niah_noise_multikey": ("noise", *words_to_numbers, 4, 1, 1),
        "niah_noise_multivalue": ("noise", *words_to_numbers, 1, 4, 1),
        "niah_noise_multiquery": ("noise", *words_to_numbers, 1, 1, 4),
        "niah_single_2": ("essay", *words_to_numbers, 1, 1, 1),
        "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
        "niah_multikey_1": ("essay", *words_to_numbers, 4, 1, 1),
        "niah_multivalue": ("essay", *words_to_numbers, 1, 4, 1),
        "niah_multiquery": ("essay", *words_to_numbers, 1, 1, 4),
    }
    name = name.removesuffix("_syn")
    if name in lines:
        return niah(*asked, *lines[name], essay=essay, around=around)
    if name == "vt_2hop":
        return vt(*asked, hops=2, around=around)
    if name == "qa_1":
        assert squad is not None
        return qa(*asked, read_squad(squad), around)
    if name == "qa_2":
        assert hotpotqa is not None
        return qa(*asked, read_hotpotqa(hotpotqa), around)
    return {"vt": vt, "cwe": cwe, "fwe": fwe}[name](*asked, around=around)
