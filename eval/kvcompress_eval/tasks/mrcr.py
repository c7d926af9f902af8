"""Multi-round retrieval: a long conversation in which one request recurs, and one of its answers is asked for again.

After OpenAI's MRCR (multi-round co-reference resolution, arXiv 2409.12640): 2, 4 or 8 requests for the same form of
text about the same topic lie among others for the same form or the same topic; the last request wants a random string
and the i-th of them. The texts are drawn from word lists instead of written by a model, hence `_syn` in the names.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from random import Random

from kvcompress_eval.tasks.fitting import draw_fitting, most_that_fits
from kvcompress_eval.tasks.questions import Ask, Question, Questions
from kvcompress_eval.tasks.ruler.words import word_list

NEEDLES = (2, 4, 8)
FORMS = ("poem", "riddle", "song", "speech", "letter", "fable", "blog post", "news article", "short story", "review")
ORDINALS = ("1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th")
SENTENCES = 3
PREFIX_LENGTH = 10
MEASURED_TEXTS = 64
"""Texts drawn to learn how many tokens the longest takes."""

Turn = tuple[str, str]
"""Request and answer."""


@dataclass(frozen=True)
class Drawn:
    """The conversation, its last request, the expected answer with its random prefix, and which one was wanted."""

    turns: list[Turn]
    request: str
    prefix: str
    text: str
    wanted: int


def make(ask: Ask, needles: int) -> Questions:
    """Conversations that fill the room.

    Raises:
        NotApplicableError: the room is too small.
    """
    assert ask.room is not None, "generated tasks are given a length"
    max_tokens = answer_tokens(ask)
    room = ask.room - max_tokens
    size = most_that_fits(lambda n: len(prompt(ask, draw(Random(ask.seed), n, needles))), room)
    items = []
    for index in range(ask.samples):
        tokens, drawn = draw_fitting(
            lambda random, others: draw(random, others, needles),
            f"{ask.seed} mrcr {needles} {ask.room} {index}",
            size,
            lambda drawn: prompt(ask, drawn),
            room,
        )
        items.append(Question(tokens, (drawn.prefix + drawn.text,), {"wanted": drawn.wanted}))
    return Questions(items, max_tokens, score, split_by=("wanted",))


def answer_tokens(ask: Ask) -> int:
    """Tokens that an answer may take: a quarter more than the longest of many."""
    random = Random(0)
    longest = max(
        len(ask.tokenizer.encode(piece(random, random.choice(word_list("noun"))))) for _ in range(MEASURED_TEXTS)
    )
    return longest * 5 // 4 + 2 * PREFIX_LENGTH


def draw(random: Random, others: int, needles: int) -> Drawn:
    """A conversation of `needles` equal requests among `others`."""
    topics = random.sample(word_list("noun"), 8)
    form, topic = random.choice(FORMS), topics[0]
    # As close to the needles as can be: the form with another topic, the topic in another form, or neither.
    near = [(form, other) for other in topics[1:]] + [(other, topic) for other in FORMS if other != form]
    far = [(other, about) for other in FORMS if other != form for about in topics[1:]]
    asked = [random.choice(near if random.random() < 0.5 else far) for _ in range(others)]
    for at in sorted(random.sample(range(others + needles), needles)):
        asked.insert(at, (form, topic))
    turns = [(f"Write a {what} about {about}.", piece(random, about)) for what, about in asked]
    mine = [text for (_, text), what in zip(turns, asked, strict=True) if what == (form, topic)]
    wanted = random.randint(1, needles)
    prefix = "".join(random.choices(string.ascii_letters + string.digits, k=PREFIX_LENGTH))
    request = (
        f"Prepend {prefix} to the {ORDINALS[wanted - 1]} (1 indexed) {form} about {topic}. "
        "Do not include any other text in your response."
    )
    return Drawn(turns, request, prefix, mine[wanted - 1], wanted)


def piece(random: Random, topic: str) -> str:
    """A few drawn sentences about a topic."""

    def sentences() -> Iterator[str]:
        for _ in range(SENTENCES):
            adjective, verb = random.choice(word_list("adjective")), random.choice(word_list("verb"))
            yield f"The {adjective} {topic} will {verb} the {random.choice(word_list('noun'))}."

    return " ".join(sentences())


def prompt(ask: Ask, drawn: Drawn) -> list[int]:
    """Tokens of the conversation, in the chat template or as a plain transcript."""
    if ask.chat:
        messages = []
        for request, answer in drawn.turns:
            messages += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        asked = ask.tokenizer.chat([*messages, {"role": "user", "content": drawn.request}])
        return ask.tokenizer.encode(asked, special=False)
    lines = [f"User: {request}\nAssistant: {answer}\n" for request, answer in drawn.turns]
    return ask.tokenizer.encode("".join(lines) + f"User: {drawn.request}\nAssistant:")


def score(answer: str, question: Question) -> float:
    """MRCR's: 0 without the random string in front, else `difflib`'s ratio of what follows it.

    White space before it is not held against the answer, as completions of `Assistant:` begin with a space.
    """
    expected = question.references[0]
    prefix, text = expected[:PREFIX_LENGTH], expected[PREFIX_LENGTH:]
    answer = answer.lstrip()
    if not answer.startswith(prefix):
        return 0.0
    return SequenceMatcher(None, answer.removeprefix(prefix), text).ratio()
