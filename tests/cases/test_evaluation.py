"""Inputs of the evaluation as users bring them: right, or refused in one line before any model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kvcompress_eval
import pytest
import torch
from kvcompress_eval import running
from kvcompress_eval.engines import choosing, open_engine
from kvcompress_eval.engines.choosing import Engines, choose_engines
from kvcompress_eval.models import describe_models, end_tokens
from kvcompress_eval.running import EngineStartError
from kvcompress_eval.suite import SUITES
from kvcompress_eval.tasks.data_files import DataSource
from kvcompress_eval.tasks.longbench.sets import FIELDS
from kvcompress_eval.tasks.longbench2 import FIELDS as FIELDS2
from kvcompress_eval.tokenizer import TextTokenizer

from tests import tiny
from tests.cases.making import check_refusal, copy, edit_json
from tests.command import Run
from tests.eval.fake_engine import FakeEngine
from tests.eval.trained_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of 1,024 tokens, and nothing beside it."""
    folder = tiny.save_model(tmp_path_factory.mktemp("models") / "base", vocab_size=1024, max_position_embeddings=2048)
    return train_tokenizer(folder, 1024, single_digits=True)


@pytest.fixture(scope="module")
def compressed(base: Path) -> Path:
    return tiny.save_compressed(base, base.parent / "compressed", tiny.uniform_spec(4))


@pytest.fixture
def call(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return run


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(running, "open_engine", load)


# --- where a sequence ends ------------------------------------------------------------------------------------------

EOS = 1


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (7, 3, {7}),
        ([7, 9], 3, {7, 9}),
        ([7, None], 3, {7}),
        ("<|eos|>", 3, {EOS}),
        (["<|eos|>", 9], 3, {EOS, 9}),
        (None, 3, {3}),
        ([], 3, {3}),
        ([None], 3, {3}),
        ("absent", 3, {3}),
        ("no file", 3, {3}),
        ("no file", [3, 4], {3, 4}),
        (None, None, {EOS}),
        ("no file", None, {EOS}),
    ],
)
def test_one_rule_says_where_a_sequence_ends(
    base: Path, tmp_path: Path, generation: Any, config: Any, expected: set[int]
) -> None:
    model = copy(base, tmp_path / "model")
    edit_json(model / "config.json", eos_token_id=config)
    path = model / "generation_config.json"
    if generation == "no file":
        path.unlink(missing_ok=True)
    else:
        path.write_text(json.dumps({} if generation == "absent" else {"eos_token_id": generation}))
    tokenizer = TextTokenizer(model)
    assert end_tokens(model, tokenizer) == expected
    # transformers stops there, whatever its own reading of the file is.
    engine = open_engine("transformers", model, tokenizer, max_context=64)
    prompt = torch.randint(10, 1000, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    [free] = engine.generate([prompt], 6, ignore_end=True)
    [made] = engine.generate([prompt], 6)
    ended = next((at for at, token in enumerate(free.tokens) if token in expected), len(free.tokens))
    assert made.tokens == free.tokens[:ended]
    engine.close()


@pytest.mark.parametrize(
    "value", ["<|im_end|>", ["<|eos|>", "</s>"], -1, 5000, 2.0, 1.5, True, {"id": 2}, [[1]], [2, "x y"]]
)
def test_an_end_that_is_no_token_is_refused(base: Path, tmp_path: Path, call: Run, no_model: None, value: Any) -> None:
    model = copy(base, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    code, _, stderr = call("eval", model, "--suite", "quick", "--engine", "transformers", "--out", tmp_path / "out")
    check_refusal(code, stderr, "generation_config.json", "eos_token_id", "expected ids below 1024")
    assert not (tmp_path / "out").exists()


def test_a_name_where_the_config_must_have_an_id_is_one_line(
    base: Path, tmp_path: Path, call: Run, no_model: None
) -> None:
    model = copy(base, tmp_path / "model")
    edit_json(model / "config.json", eos_token_id="<|eos|>")
    code, _, stderr = call("eval", model, "--suite", "quick", "--out", tmp_path / "out")
    check_refusal(code, stderr, "config.json", "eos_token_id", "expected an id")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"", b'{"eos_token_id": 1, "eos_token_id": 2}'])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_broken_json_beside_the_weights_is_one_line(
    base: Path, tmp_path: Path, call: Run, no_model: None, content: bytes, name: str
) -> None:
    model = copy(base, tmp_path / "model")
    (model / name).write_bytes(content)
    code, _, stderr = call("eval", model, "--suite", "quick", "--engine", "transformers", "--out", tmp_path / "out")
    check_refusal(code, stderr, name)


# --- rows of data sets ----------------------------------------------------------------------------------------------

ROW = {"input": "Who?", "context": "A cat sat.", "answers": ["cat", "the cat"], "all_classes": None, "length": 3}
ROW2 = {
    **dict(zip(("question", "choice_A", "choice_B", "choice_C", "choice_D"), "abcde", strict=True)),
    **dict(zip(("answer", "context", "difficulty", "length"), ("A", "A cat sat.", "easy", "short"), strict=True)),
}


def read(folder: Path, rows: list[dict[str, Any]], fields: Any = FIELDS) -> list[dict[str, Any]]:
    (folder / "qasper.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return DataSource(folder).read("longbench_qasper", ["qasper.jsonl"], "", fields, 100)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [(["cat", "the cat"], ("cat", "the cat")), ("cat", ("cat",)), (3, ("3",)), (["3", 4], ("3", "4"))],
)
def test_answers_are_read_whole(tmp_path: Path, answers: Any, expected: tuple[str, ...]) -> None:
    assert read(tmp_path, [ROW | {"answers": answers}])[0]["answers"] == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("answers", None),
        ("answers", []),
        ("answers", [["cat"]]),
        ("answers", ["cat", None]),
        ("answers", {"text": ["cat"]}),
        ("answers", True),
        ("answers", 1.5),
        ("input", None),
        ("input", 5),
        ("context", ["A cat", "sat."]),
        ("all_classes", [1, None]),
        ("all_classes", {"a": 1}),
        ("length", "long"),
        ("length", None),
        ("length", 3.5),
    ],
)
def test_a_field_of_another_kind_names_file_and_row(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"record 2 of .*qasper.jsonl, field '{field}': found .*; expected"):
        read(tmp_path, [ROW, ROW | {field: value}])


@pytest.mark.parametrize(("field", "value"), [("answer", "E"), ("answer", None), ("choice_B", 4), ("length", 12)])
def test_the_second_longbench_is_checked_too(tmp_path: Path, field: str, value: Any) -> None:
    assert read(tmp_path, [ROW2 | {"answer": " B "}], FIELDS2)[0]["answer"] == "B"
    with pytest.raises(ValueError, match=rf"record 1 of .*, field '{field}': found"):
        read(tmp_path, [ROW2 | {field: value}], FIELDS2)


def test_a_missing_field_names_file_and_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"record 2 of .*qasper.jsonl has no field 'answers'"):
        read(tmp_path, [ROW, {key: value for key, value in ROW.items() if key != "answers"}])


def test_a_string_of_answers_is_one_answer_in_the_score(base: Path, tmp_path: Path) -> None:
    (tmp_path / "qasper.jsonl").write_text(json.dumps(ROW | {"answers": "cat"}) + "\n")
    options: dict[str, Any] = {"data": tmp_path, "cache_dir": tmp_path / "cache", "engine": "transformers"}
    kvcompress_eval.run(base, suite="longbench", tasks=["longbench_qasper"], out=tmp_path / "out", **options)
    [row] = (tmp_path / "out/samples").glob("longbench_qasper-*.jsonl")
    assert json.loads(row.read_text())["references"] == ["cat"]


# --- any model, one command -----------------------------------------------------------------------------------------


def test_the_command_of_the_readme_runs_on_a_model_without_a_text(
    base: Path, compressed: Path, tmp_path: Path, call: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "find_spec", lambda name: None)
    small = {"samples": 1, "text_tokens": 600}
    monkeypatch.setitem(SUITES, "quick", SUITES["quick"].__class__(**{**vars(SUITES["quick"]), **small}))
    out = tmp_path / "report"
    code, stdout, stderr = call("eval", compressed, "--baseline", base, "--suite", "quick", "--out", out)
    assert code == 0, stderr
    assert {"results.json", "report.html", "table.md"} <= {path.name for path in out.iterdir()}
    results = json.loads((out / "results.json").read_text())
    kinds = [kind["kind"] for kind in results["perplexity"]["models"][0]["kinds"]]
    assert {"prose", "code", "dialogue"} <= set(kinds)
    [agreed] = results["agreement"]["models"]
    assert [kind["kind"] for kind in agreed["text"]["kinds"]] == kinds
    assert agreed["text"]["kl"] <= agreed["text"]["kl_p999"]
    measured = stdout.splitlines()[-2]
    assert measured.startswith("measured: 4 tasks, 4 samples at 512 tokens (template base)")
    assert "6 kinds" in measured
    assert "float32" in measured
    assert "minutes" in measured
    assert "99.9 %" in stdout
    assert "99.9 %" in (out / "table.md").read_text()
    assert "engine transformers: vLLM is not installed" in stderr


def test_rope_scaling_lengthens_what_the_model_can_take(base: Path, tmp_path: Path) -> None:
    model = copy(base, tmp_path / "model")
    edit_json(model / "config.json", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    assert [item.context for item in describe_models([base, model], None)] == [2048, 8192]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--samples", "0"], ["0 samples"]),
        (["--lengths", "-1"], ["-1"]),
        (["--lengths", "512,abc"], ["--lengths"]),
        (["--margin", "nan"], ["--margin nan"]),
        (["--margin", "-1"], ["--margin -1"]),
        (["--dtype", "foo"], ["--dtype 'foo'", "bfloat16"]),
        (["--text", "{here}"], ["--text", "is a folder"]),
        (["--text", "{here}/gone.txt"], ["--text", "gone.txt"]),
        (["--engine", "onnx"], ["onnx", "auto"]),
        (["--template", "nonsense"], ["nonsense"]),
        (["--serving-context", "-3"], ["--serving-context -3"]),
        (["--out", "{here}/file/deeper"], ["is a file"]),
    ],
)
def test_options_are_refused_before_any_model_is_loaded(
    base: Path, tmp_path: Path, call: Run, no_model: None, options: list[str], words: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    given = [option.format(here=tmp_path) for option in options]
    out = [] if "--out" in options else ["--out", tmp_path / "out"]
    code, _, stderr = call("eval", base, "--suite", "quick", *given, *out)
    check_refusal(code, stderr, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": None}, {"hidden_size": "64"}, {"max_position_embeddings": -4}]
)
def test_a_config_of_other_types_is_one_line(
    base: Path, tmp_path: Path, call: Run, no_model: None, change: dict[str, Any]
) -> None:
    model = copy(base, tmp_path / "model")
    edit_json(model / "config.json", **change)
    code, _, stderr = call("eval", model, "--suite", "quick", "--out", tmp_path / "out")
    check_refusal(code, stderr, str(model), *change)


# --- which engine ---------------------------------------------------------------------------------------------------

LLAMA = {"architectures": ["LlamaForCausalLM"]}


def test_an_engine_that_is_named_runs_everything() -> None:
    for name in ("transformers", "vllm", "http://127.0.0.1:9"):
        found = choose_engines(name, {"m": LLAMA}, tasks=["vt"], dtype="auto")
        assert (found.tasks, found.text, found.chosen) == (name, name, False)


def test_auto_takes_transformers_where_vllm_cannot_run_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(configs: dict[str, Any], **options: Any) -> Engines:
        return choose_engines("auto", configs, **{"tasks": ["vt"], "dtype": "auto", **options})

    strange = {"architectures": ["StrangeForCausalLM"]}
    for configs in ({"a": LLAMA, "b": strange}, {"b": {}}, {"b": {"architectures": "Llama"}}):
        found = chosen(configs)
        assert (found.tasks, found.text) == ("transformers", "transformers")
        assert "b's architecture" in found.reason
    assert chosen({"a": LLAMA}, tasks=[]).tasks == "transformers"
    assert "float64" in chosen({"a": LLAMA}, dtype="float64").reason
    both = chosen({"a": LLAMA, "b": {"architectures": ["KVCompressMLAForCausalLM"]}})
    assert (both.tasks, both.text, both.chosen) == ("vllm", "transformers", True)
    monkeypatch.setattr(choosing, "find_spec", lambda name: None)
    assert chosen({"a": LLAMA}).reason == "vLLM is not installed"


def test_a_vllm_that_does_not_start_is_replaced_only_where_nobody_named_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def open_instead(kind: str, *args: Any, **options: Any) -> FakeEngine:
        opened.append(kind)
        if kind == "vllm":
            raise RuntimeError("no memory\nmore about it")
        return FakeEngine(size=1024)

    monkeypatch.setattr(running, "open_engine", open_instead)
    options: dict[str, Any] = {"suite": "quick", "samples": 1, "cache_dir": tmp_path / "cache", "out": tmp_path / "out"}
    with pytest.raises(EngineStartError, match=r"vllm cannot run .*: no memory$"):
        kvcompress_eval.run(base, engine="vllm", **options)
    assert opened == ["vllm"]
    said: list[str] = []
    results = kvcompress_eval.run(base, say=said.append, **options)
    assert opened[1:] == ["vllm", "transformers"]
    assert results["environment"]["engine"] == "transformers"
    assert "no memory" in results["environment"]["engine_reason"]
    assert said[-1].startswith("warning: engine transformers: vLLM did not start")


def test_a_length_that_no_model_has_is_refused_at_once(call: Run, base: Path, tmp_path: Path) -> None:
    code, _, stderr = call("eval", base, "--out", tmp_path / "out", "--lengths", 10**12)
    check_refusal(code, stderr, "at 1000000000000 tokens does not fit models made for 2048")
