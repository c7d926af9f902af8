"""Every suite beside RULER's, end to end: on the reference model, with an engine that knows everything, interrupted."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvcompress_eval
import pytest
from kvcompress_eval import evaluate, running
from kvcompress_eval.engines import Generation
from kvcompress_eval.schema import Results
from kvcompress_eval.suite import SUITES
from kvcompress_eval.tasks.catalogue import INFINITEBENCH, MRCR, TASKS, check_task
from kvcompress_eval.tasks.longbench import chinese, sets
from kvcompress_eval.tokenizer import TextTokenizer
from kvcompress_eval.units import Unit
from kvcompress_eval.work import Work

from tests.eval.bench_files import QUESTION, RECORD, write_json, write_jsonl
from tests.eval.fake_engine import FakeEngine

REFERENCE = Path(__file__).parents[2] / "assets" / "reference-model"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was opened")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def _characters_for_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chinese, "_jieba", lambda: SimpleNamespace(cut=lambda text, cut_all: iter(text)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two records of every data set, in its own schema; the second's context is too long for most models."""
    folder = tmp_path_factory.mktemp("longbench")
    for name, entry in sets.data_sets().items():
        answer = {"retrieval": "Paragraph 7", "retrieval_zh": "段落7", "count": "7"}.get(entry.metric, "Paris 巴黎")
        classes = ["Paris 巴黎", "Rome"] if entry.metric == "classification" else None
        record = {**RECORD, "answers": [answer], "all_classes": classes}
        long = {**record, "context": "The tower is high. " * 900, "length": 4000}
        for file in (name, f"{name}_e") if entry.even else (name,):
            write_jsonl(folder / f"{file}.jsonl", record, long)
    write_json(folder / "data.json", [QUESTION, {**QUESTION, "difficulty": "easy", "length": "long"}])
    return folder


@pytest.fixture
def options(tmp_path: Path, files: Path) -> dict[str, Any]:
    return {
        "out": tmp_path / "out",
        "cache_dir": tmp_path / "cache",
        "data": files,
        "seed": 3,
        "engine": "transformers",
    }


def samples(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by file."""
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((out / "samples").glob("*.jsonl"))
    }


@pytest.mark.parametrize(
    ("suite", "changes", "tasks"),
    [
        ("needle-grid", {"lengths": [512], "samples": 11}, ["needle_grid"]),
        ("multi-turn", {"lengths": [768], "samples": 2}, ["multi_turn"]),
        ("mrcr", {"lengths": [1024], "samples": 1}, list(MRCR)),
        ("infinitebench", {"lengths": [600], "samples": 1}, list(INFINITEBENCH)),
        ("longbench2", {"lengths": [800], "limit": 2}, ["longbench2"]),
        ("longbench", {"lengths": [700], "limit": 1, "tasks": ["longbench_trec", "longbench_multifieldqa_zh"]}, None),
        ("longbench-e", {"lengths": [700], "limit": 2, "tasks": ["longbench_e_hotpotqa"]}, None),
    ],
)
def test_suites_run_on_the_reference_model(
    suite: str,
    changes: dict[str, Any],
    tasks: list[str] | None,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = kvcompress_eval.run(REFERENCE, suite=suite, **changes, **options)
    assert [row["task"] for row in results["tasks"]] == (tasks or changes["tasks"])
    assert results["skipped"] == []
    wanted = changes.get("samples") or changes["limit"]
    for row in results["tasks"]:
        assert row["n"] == wanted
        assert row["length"] == changes["lengths"][0]
        assert 0 < row["mean_length"] <= row["length"]
    for rows in samples(options["out"]).values():
        for row in rows:
            assert 0 <= row["score"] <= 1
            assert row["prompt_tokens"] + row["predicted_tokens"] <= changes["lengths"][0]

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a finished suite was run again")

    monkeypatch.setattr(running, "open_engine", load)
    again = kvcompress_eval.run(REFERENCE, suite=suite, resume=True, **changes, **options)
    again["environment"]["minutes"] = results["environment"]["minutes"]
    assert json.dumps(again, sort_keys=True) == json.dumps(results, sort_keys=True)
    # The model finds needles, so these two do measure something.
    if suite in ("needle-grid", "multi-turn"):
        assert results["tasks"][0]["score"] >= 75


def test_the_grid_and_the_turns_are_broken_down(options: dict[str, Any]) -> None:
    results = kvcompress_eval.run(
        REFERENCE, suite="needle-grid", tasks=["needle_grid", "multi_turn"], lengths=[512], samples=11, **options
    )
    assert [(row["task"], row["depth"]) for row in results["depths"]] == [
        ("needle_grid", depth) for depth in range(0, 101, 10)
    ]
    assert [(row["task"], row["by"], row["value"]) for row in results["breakdown"]] == [
        ("multi_turn", "turn", 1),
        ("multi_turn", "turn", 2),
    ]
    for rows, n in ((results["depths"], 1), (results["breakdown"], 11)):
        [task] = [row for row in results["tasks"] if row["task"] == rows[0]["task"]]
        assert {row["n"] for row in rows} == {n}
        assert {row["length"] for row in rows} == {512}
        assert sum(row["score"] for row in rows) / len(rows) == pytest.approx(task["score"], abs=0.01)


def test_thought_comes_before_the_choice(options: dict[str, Any]) -> None:
    results = kvcompress_eval.run(REFERENCE, suite="longbench2-cot", lengths=[1600], limit=1, **options)
    assert results["tasks"][0]["n"] == 1
    [rows] = samples(options["out"]).values()
    assert rows[0]["references"] == rows[0]["follow_up"]["references"] == ["A"]
    assert rows[0]["score"] == rows[0]["follow_up"]["score"]


def test_a_model_does_not_drift_from_itself(options: dict[str, Any]) -> None:
    results = kvcompress_eval.run(REFERENCE, baseline=REFERENCE, suite="drift", drift_tokens=40, **options)
    Results.model_validate(results)
    assert results["drift"]["source"] == "the baseline's own generation"
    [row] = results["drift"]["models"]
    assert row["model"] == "reference-model-2"
    assert [(bucket["position"], bucket["end"], bucket["tokens"]) for bucket in row["points"]] == [
        (0, 16, 64),
        (16, 32, 64),
        (32, 40, 32),
    ]
    for bucket in row["points"]:
        assert bucket["top1"] == 1.0
        assert bucket["kl"] == pytest.approx(0.0, abs=1e-9)


def test_compressed_models_see_the_same_prompts_and_drift(
    base: Path, compressed: Path, crushed: Path, options: dict[str, Any]
) -> None:
    changes = {"suite": "needle-grid", "tasks": ["multi_turn"], "lengths": [700], "samples": 2}
    kvcompress_eval.run([compressed], baseline=base, **changes, **options)
    found = samples(options["out"])
    assert set(found) == {"multi_turn-700-base", "multi_turn-700-compressed"}
    one, other = found.values()
    assert [row["prompt_sha256"] for row in one] == [row["prompt_sha256"] for row in other]
    assert [row["follow_up"]["prompt_sha256"] for row in one] == [row["follow_up"]["prompt_sha256"] for row in other]

    options["out"] = options["out"].parent / "drift"
    results = kvcompress_eval.run([compressed, crushed], baseline=base, suite="drift", drift_tokens=40, **options)
    four, two = (row["points"] for row in results["drift"]["models"])
    for mild, strong in zip(four, two, strict=True):
        assert 0 < mild["kl"] < strong["kl"]
        assert mild["top1"] >= strong["top1"]


class Oracle(FakeEngine):
    """Knows every answer: the first reference of whatever is asked, in the words that the task wants."""

    batch_size = 3
    fail_after: int | None = None
    asked = 0

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.answers: dict[tuple[int, ...], str] = {}
        for unit in work.units:
            self._learn(unit)

    def _learn(self, unit: Unit) -> None:
        assert unit.questions is not None
        for item in unit.questions.items:
            right = item.references[0]
            answer = f"The correct answer is ({right})" if unit.task == "longbench2" else right
            self.answers[tuple(item.prompt)] = answer
            if unit.questions.follow_up is not None:
                second = unit.questions.follow_up.ask(item, answer)
                self.answers[tuple(second.prompt)] = (
                    f"The correct answer is {right}" if unit.task == "longbench2_cot" else second.references[0]
                )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        until: Sequence[Sequence[str]] | None = None,
        *,
        ignore_end: bool = False,
        answered: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        if Oracle.fail_after is not None and Oracle.asked >= Oracle.fail_after:
            raise KeyboardInterrupt
        Oracle.asked += 1
        return [Generation((5,), self.answers[tuple(prompt)]) for prompt in prompts]


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> type[Oracle]:
    prepare, made = evaluate.prepare, []
    monkeypatch.setattr(evaluate, "prepare", lambda *args, **kwargs: made.append(prepare(*args, **kwargs)) or made[-1])
    monkeypatch.setattr(running, "open_engine", lambda *args, **kwargs: Oracle(made[-1]))
    Oracle.asked, Oracle.fail_after = 0, None
    return Oracle


def test_whoever_knows_all_answers_gets_all_points(
    base: Path, options: dict[str, Any], oracle: type[Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = kvcompress_eval.run(base, suite="needle-grid", tasks=list(TASKS), lengths=[1700], samples=2, **options)
    assert {row["task"]: round(row["score"], 1) for row in results["tasks"]} == dict.fromkeys(TASKS, 100.0)
    cut = {name: [row.get("cut") for row in rows] for name, rows in samples(options["out"]).items()}
    for name in sets.data_sets():
        assert cut[f"longbench_{name}-1700-base"] == [False, True], "the second record is longer than 1,700 tokens"


def test_an_interrupted_suite_continues(base: Path, options: dict[str, Any], oracle: type[Oracle]) -> None:
    changes: dict[str, Any] = {"suite": "multi-turn", "lengths": [700], "samples": 7}
    whole = kvcompress_eval.run(base, **changes, **options)
    assert oracle.asked == 6, "three batches of conversations, each asked twice"
    oracle.asked, oracle.fail_after = 0, 3
    options["out"] = options["out"].parent / "again"
    with pytest.raises(KeyboardInterrupt):
        kvcompress_eval.run(base, **changes, **options)
    [rows] = samples(options["out"]).values()
    assert len(rows) == 3, "a conversation is kept whole or not at all"
    oracle.asked, oracle.fail_after = 0, None
    resumed = kvcompress_eval.run(base, resume=True, **changes, **options)
    assert oracle.asked == 4
    assert json.dumps(resumed, sort_keys=True) == json.dumps(whole, sort_keys=True)


def test_texts_from_files_get_all_the_room_that_models_have(
    base: Path, options: dict[str, Any], oracle: type[Oracle]
) -> None:
    results = kvcompress_eval.run(base, suite="longbench-no-jieba", **options)
    assert len(results["tasks"]) == 18
    assert {row["length"] for row in results["tasks"]} == {2048}
    rows = samples(options["out"])["longbench_qasper-2048-base"]
    assert 2048 - 128 - 12 < rows[1]["prompt_tokens"] <= 2048 - 128


def test_what_cannot_be_done_is_refused_in_one_sentence(
    base: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(running, "open_engine", load)

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match) as error:
            kvcompress_eval.run(base, **{**options, **changes})
        assert "\n" not in str(error.value)

    refused("longbench_narrativeqa needs narrativeqa.jsonl: name its folder with --data", suite="longbench", data=None)
    refused("longbench2 needs longbench2.jsonl or data.json", suite="longbench2", data=None)
    refused("does not fit models made for 2048", suite="longbench2", lengths=[4096])
    refused("needle_grid at 4096 tokens does not fit", suite="needle-grid", lengths=[4096])
    refused(
        "expected positive numbers of both", suite="needle-grid", lengths=[], tasks=["needle_grid", "vt"], samples=0
    )
    refused("nothing to evaluate: needle_grid at 64: too short", suite="needle-grid", lengths=[64])
    refused("drift compares candidates with a baseline", suite="drift", drift_tokens=64)
    refused("drift over 2048 tokens after 128 does not fit a model made for 2048", suite="drift")
    refused("has no chat template; ask without --template chat", suite="multi-turn", lengths=[700], template="chat")
    refused("found template 'alpaca'", suite="multi-turn", template="alpaca")
    refused("unknown task 'longbench_qaser'; known: ", tasks=["longbench_qaser"], lengths=[700])


def test_the_chat_template_is_used_where_it_is_asked_for(options: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"suite": "multi-turn", "lengths": [768], "samples": 1}
    kvcompress_eval.run(REFERENCE, template="chat", **changes, **options)
    [rows] = samples(options["out"]).values()
    chatted = rows[0]["prompt_sha256"]
    kvcompress_eval.run(REFERENCE, **changes, **options)
    [rows] = samples(options["out"]).values()
    assert rows[0]["prompt_sha256"] != chatted
    assert TextTokenizer(REFERENCE).chat([{"role": "user", "content": "hello"}])


def test_suites_and_tasks_are_named_apart() -> None:
    for name, suite in SUITES.items():
        evaluate.choose_suite(name)
        for task in suite.tasks:
            check_task(task)
    assert len(SUITES["longbench"].tasks) == 21
    assert len(SUITES["longbench-e"].tasks) == 13
    assert len(INFINITEBENCH) == 5
