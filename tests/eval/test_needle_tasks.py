"""Needle grid, multi-turn reuse, multi-round retrieval and InfiniteBench: what is drawn, and how it is judged."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

import pytest
from kvcompress_eval.tasks import mrcr, multi_turn, needle_grid
from kvcompress_eval.tasks.catalogue import INFINITEBENCH, MRCR, TASKS
from kvcompress_eval.tasks.data_files import DataSource
from kvcompress_eval.tasks.fitting import most_that_fits
from kvcompress_eval.tasks.infinitebench import drawing, scoring
from kvcompress_eval.tasks.questions import Ask, Question, Questions
from kvcompress_eval.tasks.ruler import NotApplicableError
from kvcompress_eval.tokenizer import TextTokenizer

GENERATED = ["needle_grid", "multi_turn", *MRCR, *INFINITEBENCH]


def ask(tokenizer: TextTokenizer, **changes: Any) -> Ask:
    given: dict[str, Any] = {"room": 1000, "samples": 4, "seed": 7, "data": DataSource(), "chat": False}
    return Ask(tokenizer=tokenizer, **given | changes)


def question(*references: str) -> Question:
    return Question([], references)


@pytest.mark.parametrize("name", GENERATED)
def test_generated_prompts_fill_the_room_and_stay(name: str, small_tokenizer: TextTokenizer) -> None:
    def prompts(made: Questions) -> list[list[int]]:
        if made.follow_up is None:
            return [item.prompt for item in made.items]
        return [made.follow_up.ask(item, "").prompt for item in made.items]

    made = TASKS[name].make(ask(small_tokenizer))
    for prompt in prompts(made):
        assert 850 < len(prompt) + made.max_tokens <= 1000
    assert len({tuple(prompt) for prompt in prompts(made)}) == 4
    again = TASKS[name].make(ask(small_tokenizer))
    assert [(item.prompt, item.references) for item in again.items] == [
        (item.prompt, item.references) for item in made.items
    ]
    more = TASKS[name].make(ask(small_tokenizer, samples=6))
    assert prompts(more)[:4] == prompts(made), "a sample does not depend on how many follow"
    assert more.max_tokens == made.max_tokens
    other = TASKS[name].make(ask(small_tokenizer, seed=8))
    assert not {tuple(prompt) for prompt in prompts(other)} & {tuple(prompt) for prompt in prompts(made)}
    with pytest.raises(NotApplicableError, match="too short"):
        TASKS[name].make(ask(small_tokenizer, room=made.max_tokens + 8))


@pytest.mark.parametrize("name", GENERATED)
def test_the_right_answer_scores_one_and_another_does_not(name: str, small_tokenizer: TextTokenizer) -> None:
    made = TASKS[name].make(ask(small_tokenizer))
    for item, other in zip(made.items, made.items[::-1], strict=True):
        assert made.score(f" {item.references[0]}", item) == 1.0
        assert made.score(f" {item.references[0]}\n", item) >= 0.99
        if other.references != item.references:
            assert made.score(f" {other.references[0]}", item) < 1.0
        assert made.score("", item) == 0.0
        if name.startswith(
            ("needle", "multi", "mrcr", "infinitebench_passkey", "infinitebench_number", "infinitebench_kv")
        ):
            # What is asked for stands in the prompt; the random string stands in front of it only in the answer.
            wanted = item.references[0][mrcr.PREFIX_LENGTH :] if name.startswith("mrcr") else item.references[0]
            assert wanted in small_tokenizer.decode(item.prompt)


@pytest.mark.parametrize("each", [1, 7, 40])
@pytest.mark.parametrize("empty", [0, 30])
def test_the_most_that_fits(each: int, empty: int) -> None:
    for room in (empty, empty + each - 1, empty + each, 500, 12345):
        calls = []

        def tokens(n: int, calls: list[int] = calls) -> int:
            calls.append(n)
            return empty + each * n + (n > 3)  # not quite even

        found = most_that_fits(tokens, room)
        assert tokens(found) <= room < tokens(found + 1)
        assert len(calls) < 12
    with pytest.raises(NotApplicableError, match="takes 30 tokens, 29 are left"):
        most_that_fits(lambda _: 30, 29)


def test_needles_lie_at_their_depths(small_tokenizer: TextTokenizer) -> None:
    made = needle_grid.make(ask(small_tokenizer, room=1500, samples=13))
    assert [item.details["depth"] for item in made.items] == [*range(0, 101, 10), 0, 10]
    for item in made.items:
        text = small_tokenizer.decode(item.prompt)
        lines = text.split("\n")[1:-1]
        [at] = [at for at, line in enumerate(lines) if item.references[0] in line]
        assert at == round((len(lines) - 1) * item.details["depth"] / 100)
        assert text.endswith("mentioned in the provided text is")


@pytest.mark.parametrize(
    ("answer", "score"),
    [(" 1234567.", 1), ("key is: 1234567 or 7654321", 1), ("12345678", 0), ("7 1234567", 0), ("x", 0)],
)
def test_needles_are_matched_exactly(answer: str, score: float) -> None:
    assert needle_grid.exact_match(answer, question("1234567")) == score


def test_the_second_question_extends_the_first(small_tokenizer: TextTokenizer) -> None:
    made = multi_turn.make(ask(small_tokenizer))
    assert made.follow_up is not None
    assert made.follow_up.first_counts
    for item in made.items:
        second = made.follow_up.ask(item, "whatever the model said")
        assert second.prompt[: len(item.prompt)] == item.prompt
        assert second.details["shared_tokens"] == len(item.prompt)
        assert second.references != item.references
        tail = small_tokenizer.decode(second.prompt[len(item.prompt) :])
        assert tail.startswith(f" {item.references[0]}.\nWhat is the special magic number for ")
        assert second.references[0] in small_tokenizer.decode(item.prompt)
        assert second.references[0] not in tail


def test_conversations_repeat_one_request(small_tokenizer: TextTokenizer) -> None:
    for seed in range(30):
        drawn = mrcr.draw(Random(seed), 20, 4)
        asked = re.fullmatch(
            r"Prepend (\w{10}) to the (\d)(?:st|nd|rd|th) \(1 indexed\) (.+) about (\S+)\. "
            r"Do not include any other text in your response\.",
            drawn.request,
        )
        assert asked is not None
        prefix, number, form, topic = asked.groups()
        same = [text for request, text in drawn.turns if request == f"Write a {form} about {topic}."]
        assert len(drawn.turns) == 24
        assert len(same) == 4
        assert (prefix, same[int(number) - 1]) == (drawn.prefix, drawn.text)
        assert len(set(same)) == 4


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("ABCDEFGHIJthe poem", 1.0),
        ("  ABCDEFGHIJthe poem", 1.0),
        # Without its random string a right text is worth nothing.
        ("the poem", 0.0),
        ("Sure: ABCDEFGHIJthe poem", 0.0),
        ("ABCDEFGHIJ", 0.0),
        # "the po" of eight characters each: 2 * 6 / 16.
        ("ABCDEFGHIJthe port", 0.75),
    ],
)
def test_multi_round_answers_are_compared_behind_the_random_string(answer: str, score: float) -> None:
    assert mrcr.score(answer, question("ABCDEFGHIJthe poem")) == score


def test_digit_strings() -> None:
    for seed in range(50):
        key = drawing.passkey(Random(seed), 3)
        assert re.fullmatch(r"\d{5}", key.answer)
        assert f"The pass key is {key.answer}. Remember it. {key.answer} is the pass key.\n" in key.prompt
        assert key.prompt.count("The grass is green.") == 3
        digits = drawing.number_string(Random(seed), 0).answer
        assert re.fullmatch(r"\d{10}", digits)
        assert len(re.findall(r"(.)\1*", digits)) <= 5, "five digits were doubled where they stood"


def test_key_value_pairs() -> None:
    drawn = drawing.kv_retrieval(Random(1), 9)
    found = re.search(r"JSON data:\n(\{.*\})\n\nKey: \"(.+)\"$", drawn.prompt)
    assert found is not None
    pairs = json.loads(found[1])
    assert len(pairs) == 10
    assert pairs[found[2]] == drawn.answer


def test_numbers_are_found_by_rank() -> None:
    seen = set()
    for seed in range(100):
        drawn = drawing.math_find(Random(seed), 20)
        found = re.fullmatch(r"What is (the .+) in the following list\?\n\n(.+)", drawn.prompt)
        assert found is not None
        numbers = sorted(json.loads(found[2]))
        places = {"largest": -1, "second largest": -2, "third largest": -3}
        places |= {"smallest": 0, "second smallest": 1, "third smallest": 2}
        kind = found[1].removeprefix("the ").removesuffix(" number")
        expected = numbers[22] if kind == "median" else sorted(set(numbers))[places[kind]]
        assert drawn.answer == str(expected)
        seen.add(kind)
    assert len(seen) == 7
    answers = {drawing.math_find(Random(seed), 3000).answer for seed in range(40)}
    assert len(answers) > 30, "the answer to a long list cannot be known without it"


def test_code_returns_what_is_expected() -> None:
    for seed in range(30):
        drawn = drawing.code_run(Random(seed), 12)
        code = drawn.prompt.split("Python code.\n\n")[1].split("\n\nPlease compute")[0]
        found = re.search(r"exact value of (func_\d+)\((-?\d+)\)\.$", drawn.prompt)
        assert found is not None
        names: dict[str, Any] = {}
        exec(code, names)  # the functions that were just generated
        assert str(names[found[1]](int(found[2]))) == drawn.answer


@pytest.mark.parametrize(
    ("score", "answer", "reference", "expected"),
    [
        (scoring.first_integer, " 71432.", "71432", 1),
        (scoring.first_integer, "the key 1, 71432", "71432", 0),
        (scoring.first_integer, "07143", "7143", 0),
        (scoring.first_integer, "none", "71432", 0),
        (scoring.whole_word, '"value": "ab-cd".', "ab-cd", 1),
        (scoring.whole_word, "ab-cd-ef", "ab-cd", 0),
        (scoring.last_word, "The value is: -12.", "-12", 1),
        (scoring.last_word, "-12 it is", "-12", 0),
        (scoring.last_word, "", "-12", 0),
        (scoring.first_number, " 36, the largest", "36", 1),
        (scoring.first_number, "3.6", "36", 0),
        (scoring.first_number, "3.50", "3.5", 1),
        (scoring.first_number, "no", "36", 0),
    ],
)
def test_infinitebench_scores(score: Any, answer: str, reference: str, expected: float) -> None:
    assert score(answer, question(reference)) == expected
