"""LongBench v1 and v2 from files of their own format: prompts, cutting, templates, answers, refusals."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from kvcompress_eval.tasks import data_files, longbench2
from kvcompress_eval.tasks.data_files import DataSource
from kvcompress_eval.tasks.fitting import cut_middle
from kvcompress_eval.tasks.longbench import chinese, sets
from kvcompress_eval.tasks.questions import Ask
from kvcompress_eval.tasks.ruler import NotApplicableError
from kvcompress_eval.tokenizer import TextTokenizer

from tests import require
from tests.eval.bench_files import QUESTION, RECORD, write_json, write_jsonl


def ask(tokenizer: TextTokenizer, folder: Path | None, **changes: Any) -> Ask:
    given: dict[str, Any] = {"room": None, "samples": 100, "seed": 1, "data": DataSource(folder), "chat": False}
    return Ask(tokenizer=tokenizer, **given | changes)


def test_the_sets_are_the_benchmarks() -> None:
    # Metric and tokens to generate, as the benchmark's eval.py and dataset2maxlen.json have them.
    expected = {
        "narrativeqa": ("qa_f1", 128), "qasper": ("qa_f1", 128), "multifieldqa_en": ("qa_f1", 64),
        "multifieldqa_zh": ("qa_f1_zh", 64), "hotpotqa": ("qa_f1", 32), "2wikimqa": ("qa_f1", 32),
        "musique": ("qa_f1", 32), "dureader": ("rouge_zh", 128), "gov_report": ("rouge", 512), "qmsum": ("rouge", 512),
        "multi_news": ("rouge", 512), "vcsum": ("rouge_zh", 512), "trec": ("classification", 64),
        "triviaqa": ("qa_f1", 32), "samsum": ("rouge", 128), "lsht": ("classification", 64),
        "passage_count": ("count", 32), "passage_retrieval_en": ("retrieval", 32),
        "passage_retrieval_zh": ("retrieval_zh", 32), "lcc": ("code_similarity", 64),
        "repobench-p": ("code_similarity", 64),
    }  # fmt: skip
    found = sets.data_sets()
    assert {name: (entry.metric, entry.max_tokens) for name, entry in found.items()} == expected
    assert {name for name, entry in found.items() if entry.first_line} == {"trec", "triviaqa", "samsum", "lsht"}
    assert {name for name, entry in found.items() if entry.examples} == {
        "trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p",
    }  # fmt: skip
    assert sum(entry.even for entry in found.values()) == 13
    for entry in found.values():
        assert "{context}" in entry.prompt


def test_prompts_are_the_template_around_the_record(small_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "hotpotqa.jsonl", RECORD)
    [item] = sets.make("hotpotqa", ask(small_tokenizer, tmp_path)).items
    text = small_tokenizer.decode(item.prompt)
    assert text.startswith("Answer the question based on the given passages. Only give me the answer and do not")
    assert f"The following are given passages.\n{RECORD['context']}\n\nAnswer the question" in text
    assert text.endswith(f"\n\nQuestion: {RECORD['input']}\nAnswer:")
    assert item.references == tuple(RECORD["answers"])
    assert item.details == {"cut": False}


def test_files_are_found_in_the_folder_or_its_data_folder(small_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "qasper.jsonl", RECORD, RECORD, RECORD)
    assert len(sets.make("qasper", ask(small_tokenizer, tmp_path, samples=2)).items) == 2


def test_long_prompts_lose_their_middle(large_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    words = " ".join(f"word{at}" for at in range(2000))
    write_jsonl(tmp_path / "hotpotqa.jsonl", {**RECORD, "context": words})
    made = sets.make("hotpotqa", ask(large_tokenizer, tmp_path, room=400))
    [item] = made.items
    assert item.details == {"cut": True}
    room = 400 - made.max_tokens
    assert room - 12 < len(item.prompt) <= room
    whole = large_tokenizer.encode(sets.data_sets()["hotpotqa"].prompt.format(**{**RECORD, "context": words}))
    kept = 100  # well inside either half, which are joined by decoding and encoding again
    assert item.prompt[:kept] == whole[:kept]
    assert item.prompt[-kept:] == whole[-kept:]
    with pytest.raises(NotApplicableError, match="too short: 33 tokens leave no room beside 32 generated"):
        sets.make("hotpotqa", ask(large_tokenizer, tmp_path, room=33))


def test_cutting_takes_equal_halves(small_tokenizer: TextTokenizer) -> None:
    text = "0123456789" * 10  # a token per digit, and one that begins the sequence
    assert cut_middle(text, small_tokenizer, 101) == (text, False)
    # 20 tokens, of which the first is special and not decoded: 9 digits and 10, at most 20 tokens once encoded again.
    assert cut_middle(text, small_tokenizer, 20) == ("012345678" + "0123456789", True)
    assert cut_middle(text, small_tokenizer, None) == (text, False)


def test_examples_and_code_go_without_a_chat_template(small_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    chatty = TextTokenizer(small_tokenizer.model)
    chatty._tokenizer.chat_template = (
        "<|bos|>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    for name in ("hotpotqa", "trec", "lcc"):
        write_jsonl(tmp_path / f"{name}.jsonl", {**RECORD, "all_classes": ["Paris", "Rome"]})
    asked = ask(chatty, tmp_path, chat=True)
    plain = ask(chatty, tmp_path)
    for name in ("trec", "lcc"):
        assert sets.make(name, asked).items[0].prompt == sets.make(name, plain).items[0].prompt
    prompt = sets.make("hotpotqa", asked).items[0].prompt
    assert prompt.count(0) == 1, "the template's own beginning is not doubled"
    text = chatty.decode(prompt)
    assert text.startswith("[user]Answer the question")
    assert text.endswith("\nAnswer:[assistant]")
    # The template takes part of the room.
    assert len(sets.make("hotpotqa", ask(chatty, tmp_path, chat=True, room=120)).items[0].prompt) <= 120 - 32


def test_first_lines_classes_and_the_best_reference(small_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "trec.jsonl", {**RECORD, "answers": ["Food"], "all_classes": ["Food", "Animal"]})
    trec = sets.make("trec", ask(small_tokenizer, tmp_path))
    assert trec.score("\nFood\nAnimal", trec.items[0]) == 1.0
    assert trec.score(" Food Animal", trec.items[0]) == 0.5
    write_jsonl(tmp_path / "hotpotqa.jsonl", {**RECORD, "answers": ["Paris", "the city of Paris"]})
    hotpotqa = sets.make("hotpotqa", ask(small_tokenizer, tmp_path))
    # Against the second: city, of, Paris all there; the first line is not cut off here.
    assert hotpotqa.score("city\nof Paris", hotpotqa.items[0]) == 1.0
    assert hotpotqa.score("Paris", hotpotqa.items[0]) == 1.0


def test_longbench_e_is_grouped_by_length(small_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    lengths = (3999, 4000, 7999, 8000)
    write_jsonl(tmp_path / "hotpotqa_e.jsonl", *({**RECORD, "length": length} for length in lengths))
    made = sets.make("hotpotqa", ask(small_tokenizer, tmp_path), even=True)
    assert [item.details["words"] for item in made.items] == ["0-4k", "4-8k", "4-8k", "8k+"]
    assert made.split_by == ("words",)


def test_missing_and_wrong_files_are_named(small_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    def refused(match: str, folder: Path | None = tmp_path) -> None:
        with pytest.raises(ValueError, match=match):
            sets.make("qasper", ask(small_tokenizer, folder))

    refused("longbench_qasper needs qasper.jsonl: name its folder with --data, or allow a download", None)
    refused("no folder at .*nowhere", tmp_path / "nowhere")
    refused("needs qasper.jsonl, and .* has none")
    path = tmp_path / "qasper.jsonl"
    path.write_text("")
    refused("qasper.jsonl holds no records")
    path.write_text("{not json")
    refused("qasper.jsonl is not a file of JSON records")
    path.write_text("[1]\n")
    refused("holds something else than JSON objects")
    write_jsonl(path, RECORD, {key: value for key, value in RECORD.items() if key != "answers"})
    refused("record 2 of .*qasper.jsonl has no field 'answers'; expected input, context, answers")


def test_chinese_sets_refuse_without_jieba(
    small_tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ValueError("not installed")

    monkeypatch.setattr(chinese, "_jieba", missing)
    for name in ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"):
        write_jsonl(tmp_path / f"{name}.jsonl", {**RECORD, "all_classes": []})
        if sets.data_sets()[name].metric.endswith("_zh") and name != "passage_retrieval_zh":
            with pytest.raises(ValueError, match=f"longbench_{name}: not installed"):
                sets.make(name, ask(small_tokenizer, tmp_path))
        else:
            sets.make(name, ask(small_tokenizer, tmp_path))


def test_a_download_goes_through_datasets_and_only_when_allowed(
    small_tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require.need("datasets")
    import datasets

    write_jsonl(tmp_path / "qasper.jsonl", RECORD, RECORD)
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.write(tmp_path / "qasper.jsonl", "data/qasper.jsonl")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    load, asked = datasets.load_dataset, []

    def local(kind: str, *, data_files: str, split: str) -> Any:
        # The same kind of address, on this machine: a file inside of a zip.
        asked.append(data_files)
        inside, _ = data_files.split("::")
        return load(kind, data_files=f"{inside}::{archive}", split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    made = sets.make("qasper", ask(small_tokenizer, None, data=DataSource(None, network=True), samples=1))
    assert asked == ["zip://data/qasper.jsonl::hf://datasets/THUDM/LongBench/data.zip"]
    assert len(made.items) == 1
    assert made.items[0].references == tuple(RECORD["answers"])
    sets.make("qasper", ask(small_tokenizer, tmp_path, data=DataSource(tmp_path, network=True)))
    assert len(asked) == 1, "a file at hand is not downloaded"
    with pytest.raises(ValueError, match=r"zip://data/2wikimqa.jsonl.* could not be loaded"):
        sets.make("2wikimqa", ask(small_tokenizer, None, data=DataSource(None, network=True)))


def test_json_lists_and_lines_are_read(tmp_path: Path) -> None:
    write_json(tmp_path / "data.json", [{"a": 1}, {"a": 2}])
    assert data_files.read_records(tmp_path / "data.json", 1) == [{"a": 1}]
    (tmp_path / "data.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert data_files.read_records(tmp_path / "data.jsonl", 5) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The correct answer is (B).", "B"),
        ("**The correct answer is (C)**", "C"),
        ("The correct answer is D", "D"),
        # The form with brackets wins wherever it stands.
        ("The correct answer is A? No. The correct answer is (B)", "B"),
        ("the correct answer is (B)", None),
        ("(B)", None),
        ("The correct answer is (E)", None),
        ("", None),
    ],
)
def test_letters(answer: str, letter: str | None) -> None:
    assert longbench2.chosen_letter(answer) == letter


def test_longbench2_direct(small_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    write_json(tmp_path / "data.json", [QUESTION, {**QUESTION, "difficulty": "easy", "length": "long"}])
    made = longbench2.make(ask(small_tokenizer, tmp_path))
    text = small_tokenizer.decode(made.items[0].prompt)
    assert text == (
        "Please read the following text and answer the question below.\n\n<text>\nIt costs $Q$ 5.\n</text>\n\n"
        "What is the correct answer to this question: What is red?\nChoices:\n(A) apple\n(B) sky\n(C) sea\n(D) $DOC$"
        "\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    ), "marks inside of the texts stay, outer white space goes"
    assert [item.details["difficulty"] for item in made.items] == ["hard", "easy"]
    assert made.split_by == ("difficulty", "words")
    assert made.max_tokens == 128
    assert made.score("The correct answer is (A)", made.items[0]) == 1.0
    assert made.score("The correct answer is (B)", made.items[0]) == 0.0


def test_longbench2_reasons_first_and_then_chooses(small_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    write_json(tmp_path / "data.json", [QUESTION])
    made = longbench2.make(ask(small_tokenizer, tmp_path), thought=True)
    assert made.max_tokens == 1024
    [item] = made.items
    assert small_tokenizer.decode(item.prompt).endswith("(D) $DOC$\n\nLet’s think step by step:")
    assert made.follow_up is not None
    assert not made.follow_up.first_counts
    second = made.follow_up.ask(item, " Apples are red. ")
    text = small_tokenizer.decode(second.prompt)
    assert "The text is too long and omitted here." in text
    assert "Let’s think step by step: Apples are red.\n\nBased on the above, what is the single, most likely" in text
    assert "It costs" not in text
    assert second.references == ("A",)
    assert len(second.prompt) <= made.follow_up.longest
    assert made.needs == made.follow_up.longest + 128
    tight = longbench2.make(ask(small_tokenizer, tmp_path, room=1400), thought=True)
    assert tight.follow_up is not None
    long = tight.follow_up.ask(tight.items[0], "word " * 3000)
    assert len(long.prompt) <= tight.follow_up.longest <= 1400 - 128
    assert json.dumps(tight.items[0].details) == json.dumps(
        {"index": 0, "cut": False, "difficulty": "hard", "words": "short"}
    )
