"""Small files in the formats of the essays, SQuAD 2.0 and HotpotQA that RULER is made from; the texts are invented."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from kvcompress_eval.tasks.ruler import Sources
from kvcompress_eval.tasks.ruler.prose import prose

NAMES = ("Ada", "Bela", "Cem", "Dora", "Emre", "Fay", "Goran", "Hila", "Ivo", "Jun")
THINGS = ("mill", "bridge", "chapel", "granary", "tower", "harbour", "library", "orchard", "well", "ferry")


def write_sources(folder: Path, questions: int = 120, sentences_each: int = 3) -> Sources:
    """All files but the word list."""
    sentences = prose(40_000).replace("\n\n", " ").split(". ")
    random = Random(1)

    def paragraph(fact: str) -> str:
        told = [f"{sentence}." for sentence in random.sample(sentences, sentences_each)]
        told.insert(random.randrange(sentences_each + 1), fact)
        return " ".join(told)

    facts = [
        (f"Who built the {THINGS[number % 10]} of place {number}?", f"{random.choice(NAMES)} {number}")
        for number in range(questions * 2)
    ]
    paragraphs = [paragraph(f"It was {answer} who built it.") for _, answer in facts]
    write_squad(folder / "squad.json", facts, paragraphs)
    write_hotpotqa(folder / "hotpotqa.json", facts[:questions], paragraphs, random)
    # A line separator, a brace and an abbreviation are where careless readers stumble.
    essay = prose(3_000).replace(", ", ",\u2028", 5) + ' He said, "it is {so}!" Mr. Q. agreed (as ever). The end'
    (folder / "essay.json").write_text(json.dumps({"text": essay}))
    return Sources(essay=folder / "essay.json", squad=folder / "squad.json", hotpotqa=folder / "hotpotqa.json")


def write_squad(path: Path, facts: list[tuple[str, str]], paragraphs: list[str]) -> None:
    """Articles of eight paragraphs with one question each; every fifth has no answer."""
    entries = [
        {
            "context": text,
            "qas": [
                {
                    "question": question,
                    "id": question,
                    "is_impossible": number % 5 == 4,
                    "answers": [] if number % 5 == 4 else [{"text": answer, "answer_start": 0}, {"text": answer[:3]}],
                }
            ],
        }
        for number, ((question, answer), text) in enumerate(zip(facts, paragraphs, strict=True))
    ]
    articles = [{"title": f"Article {at}", "paragraphs": entries[at : at + 8]} for at in range(0, len(entries), 8)]
    path.write_text(json.dumps({"version": "v2.0", "data": articles}))


def write_hotpotqa(path: Path, facts: list[tuple[str, str]], paragraphs: list[str], random: Random) -> None:
    """Six paragraphs per question, each a title and its sentences."""
    items = []
    for number, (question, answer) in enumerate(facts):
        others = random.sample([at for at in range(len(paragraphs)) if at != number], 5)
        context = [[f"Place {at}", [f"{line} " for line in paragraphs[at].split(". ")]] for at in [number, *others]]
        items.append({"_id": str(number), "question": question, "answer": answer, "context": context})
    path.write_text(json.dumps(items))
