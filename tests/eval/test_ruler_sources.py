"""Files that RULER tasks are made from, model templates, and what is said when one is missing or wrong."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
from kvcompress_eval.suite import SUITES
from kvcompress_eval.tasks.ruler import (
    ALL,
    SYNTHETIC,
    NotApplicableError,
    Request,
    Sources,
    check_sources,
    generate,
    model_template,
    provenance,
    ruler_task,
)
from kvcompress_eval.tasks.ruler.cwe import Words
from kvcompress_eval.tasks.ruler.essay import Essay, essay, sentence_splitter, split_after_marks
from kvcompress_eval.tasks.ruler.prose import prose
from kvcompress_eval.tasks.ruler.qa import hotpotqa, squad
from kvcompress_eval.tasks.ruler.sources import more_words
from kvcompress_eval.tokenizer import TextTokenizer

from benchmarks.ruler_files import write_sources


def test_the_thirteen_tasks_and_their_stand_ins() -> None:
    assert len(ALL) == 13
    assert sorted(name for name, task in ALL.items() if task.needs) == [
        "niah_multikey_1",
        "niah_multiquery",
        "niah_multivalue",
        "niah_single_2",
        "niah_single_3",
        "qa_1",
        "qa_2",
    ]
    assert set(SYNTHETIC) == {f"{name}_syn" for name, task in ALL.items() if task.needs == ("essay",)}
    assert set(SUITES["ruler-13"].tasks) == set(ALL)
    check_sources(SUITES["ruler-syn"].tasks, Sources())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("niah_single_2", "niah_single_2: the essays .* name the file with --essay; niah_single_2_syn needs none"),
        ("qa_1", "qa_1: SQuAD 2.0's dev-v2.0.json must lie on disk for this task; name the file with --squad"),
        ("qa_2", "qa_2: HotpotQA's .* name the file with --hotpotqa"),
    ],
)
def test_a_missing_file_is_named_with_its_option(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_sources(["vt", name], Sources())
    with pytest.raises(ValueError, match="name the file with"):
        generate(name, length=4096, samples=1, seed=1, count=len, tokenizer_sha256="")


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file at .*gone.json, which --squad names"):
        Sources(squad=tmp_path / "gone.json")

    def written(name: str, content: str) -> Path:
        path = tmp_path / name
        path.write_text(content)
        return path

    with pytest.raises(ValueError, match=r"a\.json is not JSON"):
        squad(written("a.json", "<html>"))
    with pytest.raises(ValueError, match=r"b\.json is not SQuAD 2.0: no field 'data'"):
        squad(written("b.json", "{}"))
    with pytest.raises(ValueError, match=r"c\.json is not HotpotQA in the distractor setting"):
        hotpotqa(written("c.json", '[{"context": ["a"], "question": "?", "answer": "!"}]'))
    with pytest.raises(ValueError, match=r"d\.json holds no question that can be answered"):
        hotpotqa(written("d.json", "[]"))
    article = {"context": "A cat.", "qas": [{"question": "?", "answers": [{"text": None}], "is_impossible": False}]}
    with pytest.raises(ValueError, match=r'i\.json, question 1: found \["\?", null\]; expected its text and at least'):
        squad(written("i.json", json.dumps({"data": [{"paragraphs": [article]}]})))
    article["qas"][0]["answers"] = []
    with pytest.raises(ValueError, match=r'j\.json, question 1: found \["\?"\]'):
        squad(written("j.json", json.dumps({"data": [{"paragraphs": [article]}]})))
    for context in (5, None, ["a"], {"a": 1}):
        article["context"] = context
        with pytest.raises(ValueError, match=r"k\.json is not SQuAD 2.0"):
            squad(written("k.json", json.dumps({"data": [{"paragraphs": [article]}]})))
    for answer in (None, 3, ["cat"], ""):
        row = {"context": [["On cats", ["A cat."]]], "question": "?", "answer": answer}
        with pytest.raises(ValueError, match=r"l\.json, question 1: found"):
            hotpotqa(written("l.json", json.dumps([row])))
    with pytest.raises(ValueError, match=r"e\.json holds no essay"):
        essay(written("e.json", '{"title": "On files"}'))
    with pytest.raises(ValueError, match=r"f\.txt holds no essay"):
        essay(written("f.txt", " \n"))
    with pytest.raises(ValueError, match=r"g\.json holds no list of words"):
        more_words(written("g.json", '{"1": 2}'))


def test_more_samples_than_questions_are_refused(tmp_path: Path) -> None:
    sources = write_sources(tmp_path, questions=10)
    with pytest.raises(ValueError, match="has 16 answerable questions, 17 samples were asked for"):
        generate("qa_1", length=9999, samples=17, seed=1, count=len, tokenizer_sha256="", sources=sources)


def test_a_question_whose_documents_do_not_fit_is_too_short(tmp_path: Path) -> None:
    sources = write_sources(tmp_path, questions=20)
    counted: list[int] = []

    def count(text: str) -> int:
        counted.append(text.count("Document "))
        return counted[-1] * (2 if len(counted) < 8 else 3)

    # The search settles on 14 documents of 2 tokens. Of 3 they do not fit, and 4 are less than a question's 6.
    with pytest.raises(NotApplicableError, match="too short: a question needs its 6 documents, 4 fit"):
        list(ruler_task("qa_2").generate(Request(60, 1, 1, count, sources=sources)))
    assert counted[-1] == 14


def test_essays_are_read_from_text_and_from_json(tmp_path: Path) -> None:
    text = "One sentence here.  Another\n\nfollows. A third"
    (tmp_path / "essay.txt").write_text(text)
    (tmp_path / "essay.json").write_text(json.dumps({"text": text}))
    for name in ("essay.txt", "essay.json"):
        read = essay(tmp_path / name)
        assert read.sentences(7) == ["One sentence here.", "Another follows.", "A third"]
        assert read.sentences(9) == [
            "One sentence here.",
            "Another follows.",
            "A thirdOne sentence".replace("dO", "d O"),
        ]


def test_needles_keep_their_order_and_stand_between_sentences() -> None:
    text = Essay("A b. C d. E f. G h.", split_after_marks)
    for seed in range(20):
        placed = text.with_needles(Random(seed), 8, ["<1>", "<2>"])
        assert placed.index("<1>") < placed.index("<2>")
        assert " ".join(placed.replace("<1>", "").replace("<2>", "").split()) == "A b. C d. E f. G h."
        for part in placed.replace("<1>", "|").replace("<2>", "|").split("|"):
            assert not part.strip() or part.strip().endswith(".")


def test_sentences_end_after_marks() -> None:
    text = 'He said "stop!" Then (so it was told.) she left? Yes... and no, 3.5 of them. end'
    assert split_after_marks(text) == [
        'He said "stop!"',
        "Then (so it was told.)",
        "she left?",
        "Yes...",
        "and no, 3.5 of them.",
        "end",
    ]


def test_sentences_of_nltk_are_used_where_its_model_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: Callable[[Any], None]
) -> None:
    (tmp_path / "essay.txt").write_text("One. Two.")
    sources = Sources(essay=tmp_path / "essay.txt")

    def installed(sent_tokenize: Any) -> None:
        package, module = ModuleType("nltk"), ModuleType("nltk.tokenize")
        module.sent_tokenize = sent_tokenize  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "nltk", package)
        monkeypatch.setitem(sys.modules, "nltk.tokenize", module)
        forget(sentence_splitter)

    def without_model(text: str) -> list[str]:
        raise LookupError("punkt_tab")

    installed(without_model)
    monkeypatch.setitem(sys.modules, "punkt.data", None)
    assert sentence_splitter() == ("marks", split_after_marks)
    assert provenance(sources)["sentences"] == "marks"
    installed(lambda text: [text])
    assert sentence_splitter()[0] == "nltk punkt"
    assert provenance(sources)["sentences"] == "nltk punkt"
    assert essay(tmp_path / "essay.txt").sentences(2) == ["One. Two."]
    assert provenance(Sources()) == {}


def test_the_packaged_parameters_of_nltk_split_where_marks_would_not(forget: Callable[[Any], None]) -> None:
    forget(sentence_splitter)
    name, split = sentence_splitter()
    text = 'Dr. Smith paid $3.50 in the U.S. last year. "Too much?" he asked. See p. 12 of Mr. Hale\'s book.'
    assert name == "nltk punkt"
    assert split(text) == [
        "Dr. Smith paid $3.50 in the U.S. last year.",
        '"Too much?"',
        "he asked.",
        "See p. 12 of Mr. Hale's book.",
    ]
    assert len(split_after_marks(text)) > 4, "marks end sentences after titles, too"


def test_generated_prose_is_long_and_the_same_everywhere() -> None:
    assert len(prose().split()) >= 100_000
    assert prose(500) == prose()[: len(prose(500))]
    expected = "9d01cfcba268bda137ebcc951611a9a12019d7b689ab8b26de3bf03f08b4ca88"
    assert hashlib.sha256(prose().encode()).hexdigest() == expected
    assert "magic" not in prose()


def test_a_longer_word_list_serves_longer_lists(tmp_path: Path) -> None:
    for name, content in (("w.json", '{"0": "x", "1": "y", "2": "z"}'), ("w.txt", "x\ny\nz\n")):
        (tmp_path / name).write_text(content)
        words = Words(["a", "b"], more_words(tmp_path / name))
        assert words.of_at_least(2) == ["a", "b"]
        assert list(words.of_at_least(3)) == ["x", "y", "z"]
        with pytest.raises(NotApplicableError, match=r"too long: a list of 4 .* --words"):
            words.of_at_least(4)


def test_cwe_of_128k_tokens_needs_more_words(tmp_path: Path) -> None:
    def count(text: str) -> int:
        return 2 * text.count(" ")

    options: dict[str, Any] = {"length": 131072, "samples": 1, "seed": 1, "count": count, "tokenizer_sha256": ""}
    with pytest.raises(NotApplicableError, match=r"too long: .* --words"):
        generate("cwe", **options)
    (tmp_path / "words.txt").write_text("\n".join(f"word{number}" for number in range(50_000)))
    [sample] = generate("cwe", sources=Sources(words=tmp_path / "words.txt"), **options)
    assert 120_000 < sample.length <= 131072


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("base", "", ""),
        ("meta-chat", "[INST] ", " [/INST]"),
        ("Phi3", "<|user|>\n", "<|end|>\n<|assistant|>\n"),
        (
            "meta-llama3",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_model_templates(name: str, before: str, after: str) -> None:
    template = model_template(name, lambda: ("", ""))
    assert (template.before, template.after) == (before, after)
    assert template.wrap("{context}") == f"{before}{{context}}{after}"


def test_chat_takes_the_template_of_the_tokenizer(small_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        model_template("chat", small_tokenizer.chat_turn)
    with pytest.raises(ValueError, match=r"unknown prompt template 'llama'; known: base, meta-chat, .*, chat"):
        model_template("llama", small_tokenizer.chat_turn)
    tokenizer = TextTokenizer(small_tokenizer.model)
    tokenizer._tokenizer.chat_template = (
        "<|bos|>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template = model_template("chat", tokenizer.chat_turn)
    assert (template.before, template.after) == ("<|bos|>[user] ", "\n[assistant]")
    prompt = template.wrap("Hello.")
    assert tokenizer.encode(prompt)[:2] == [0, 0]
    assert tokenizer.encode_prompt(prompt) == tokenizer.encode(prompt)[1:], "one token begins the sequence"
    assert tokenizer.encode_prompt("Hello.") == tokenizer.encode("Hello.")
    tokenizer._tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ValueError, match="shows a message 0 times"):
        tokenizer.chat_turn()
