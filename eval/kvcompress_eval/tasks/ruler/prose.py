"""English prose of any length from a small grammar: the haystack of the `*_syn` tasks, the same on every machine.

It tells of people in a valley who build, trade and keep records, in sentences of four shapes. It knows no numbers and
none of the words that needles are made with.
"""

from __future__ import annotations

from functools import cache
from random import Random

WORDS = 100_000
"""What prompts of 128K tokens need; longer ones begin again."""

WHO = (
    "the miller", "an old surveyor", "the younger of the two sisters", "the schoolmaster", "a travelling printer",
    "the keeper of the bridge", "nobody in the village", "the council", "every family along the river",
    "the woman who repaired the clocks", "a merchant from the coast", "the gardener and his apprentice",
    "the ferryman", "most of the harvesters", "the librarian", "a student of the stars", "the baker's widow",
)  # fmt: skip
DID = (
    "wrote down", "had forgotten", "would often describe", "argued about", "spent a whole winter on",
    "explained to the children", "could not agree on", "drew a careful picture of", "kept returning to",
    "knew more than others about", "planned to improve", "learned to live with", "took great care of",
)  # fmt: skip
WHAT = (
    "the shape of the old road", "the price of salt", "how the mill was moved", "the letters from the north",
    "the garden behind the chapel", "the way snow gathers on the eastern slope", "a map with too many rivers",
    "the first frost of the year", "the sound of the wheels on the stones", "the long silence of the bells",
    "the rules for sharing water", "the boats that never came back", "the colour of the river in spring",
    "what the stars had to do with the harvest", "the narrow stair behind the granary", "the open door at night",
)  # fmt: skip
WHEN = (
    "in the evening", "long before the bridge was finished", "on days without wind", "after the market had closed",
    "for as long as anyone could remember", "during the second dry summer", "while the others slept",
    "at the beginning of every season", "when the road was under water", "by the light of a single lamp",
)  # fmt: skip
BECAUSE = (
    "because the ground was still soft", "since there was little else to do", "although few would have noticed",
    "so that the work could go on", "as if it had always been so", "even though it made no difference to the price",
    "unless the weather turned", "because somebody had to", "which surprised the visitors",
)  # fmt: skip
THUS = (
    "Later",
    "In this way",
    "As a rule",
    "To be fair",
    "Much later",
    "By all accounts",
    "Without a word",
    "Now and then",
)


@cache
def prose(words: int = WORDS) -> str:
    """At least that many words: paragraphs of three to seven sentences."""
    random = Random(0)
    paragraphs: list[str] = []
    count = 0
    while count < words:
        paragraph = " ".join(sentence(random) for _ in range(random.randint(3, 7)))
        paragraphs.append(paragraph)
        count += len(paragraph.split())
    return "\n\n".join(paragraphs)


def sentence(random: Random) -> str:
    """One sentence, ending in a full stop."""
    who, did, what, when = (random.choice(part) for part in (WHO, DID, WHAT, WHEN))
    shape = random.randrange(4)
    if shape == 0:
        text = f"{who} {did} {what} {when}."
    elif shape == 1:
        text = f"{when}, {who} {did} {what}, {random.choice(BECAUSE)}."
    elif shape == 2:
        text = f"{random.choice(THUS)}, {who} {did} {what}, and {random.choice(WHO)} {random.choice(DID)} it as well."
    else:
        text = f"{who} {did} {what}, {random.choice(BECAUSE)}, and {when} also {random.choice(WHAT)}."
    return text[0].upper() + text[1:]
