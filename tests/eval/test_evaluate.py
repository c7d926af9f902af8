"""The whole evaluation on tiny models: results, resuming, and refusals before any work."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import kvcompress_eval
import pytest
from kvcompress_eval import evaluate, running, schema
from kvcompress_eval.engines import transformers_engine
from kvcompress_eval.models import bytes_per_token, codec_spec, describe_models, read_config
from kvcompress_eval.suite import SUITES, Suite
from kvcompress_eval.tasks.ruler import BASE, generate, ruler_task
from kvcompress_eval.tokenizer import TextTokenizer
from kvcompress_eval.work import prepare

from benchmarks.ruler_files import write_sources
from tests import tiny
from tests.eval.trained_tokenizer import train_tokenizer

SMALL = Suite(
    summary="for tests",
    tasks=("fwe", "niah_multikey_3"),
    lengths=(400,),
    samples=2,
    text_tokens=300,
    window=128,
    stride=64,
    agreement_prompts=1,
    agreement_new_tokens=6,
)


@pytest.fixture
def options(base: Path, tmp_path: Path) -> dict[str, Any]:
    folders = {"out": tmp_path / "out", "cache_dir": tmp_path / "cache"}
    return {"suite": SMALL, "seed": 1, "engine": "transformers", "text": base / "heldout.txt", **folders}


def test_results_have_the_documented_shape(
    base: Path, compressed: Path, crushed: Path, options: dict[str, Any]
) -> None:
    told: list[tuple[str, int, int]] = []
    results = kvcompress_eval.run(
        [compressed, crushed],
        baseline=base,
        serving_context=64,
        noise_floor=True,
        progress=lambda *state: told.append(state),
        **options,
    )
    assert json.loads((options["out"] / "results.json").read_text()) == results
    schema.Results.model_validate(results)
    names = ["base", "compressed", "crushed"]
    assert [model["name"] for model in results["models"]] == names
    assert [model["role"] for model in results["models"]] == ["baseline", "candidate", "candidate"]
    sizes = [model["bytes_per_token"] for model in results["models"]]
    assert sizes[0] == 2 * tiny.NUM_LAYERS * tiny.NUM_KV_HEADS * tiny.HEAD_DIM * 2
    assert sizes[0] > sizes[1] > sizes[2]
    assert results["models"][0]["manifest_sha256"] is None
    assert len(results["models"][1]["manifest_sha256"]) == 64

    assert [(row["task"], row["model"]) for row in results["tasks"]] == [("fwe", name) for name in names]
    assert [row["task"] for row in results["skipped"]] == ["niah_multikey_3"]
    assert "too short" in results["skipped"][0]["reason"]
    for row in results["tasks"] + results["overall"]:
        assert row["n"] == 2
        assert row["ci95"][0] <= row["score"] <= row["ci95"][1]
        assert (row["verdict"] is None) == (row["model"] == "base")

    rows = [json.loads(line) for line in (options["out"] / "samples/fwe-400-base.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1]
    other = (options["out"] / "samples/fwe-400-crushed.jsonl").read_text().splitlines()
    assert [row["prompt_sha256"] for row in rows] == [json.loads(line)["prompt_sha256"] for line in other]

    perplexity = {row["model"]: row for row in results["perplexity"]["models"]}
    assert perplexity["base"]["tokens"] == 300
    assert "increase" not in perplexity["base"]
    agreement = {row["model"]: row for row in results["agreement"]["models"]}
    assert set(agreement) == {"compressed", "crushed"}
    assert agreement["compressed"]["text"]["kl"] < agreement["crushed"]["text"]["kl"]
    assert agreement["compressed"]["text"]["top1"] > agreement["crushed"]["text"]["top1"]
    assert [point["position"] for point in results["drift"]["models"][0]["points"]] == [0, 64]
    for row in results["agreement"]["models"]:
        assert row["text"]["tokens"] == row["text"]["kl_tokens"] == 300
        assert row["text"]["kl"] <= row["text"]["kl_p99"] <= row["text"]["kl_p999"]
        assert row["text"]["kinds"] == [], "one text has no kinds"
    floor = results["noise_floor"]
    assert (floor["model"], floor["seeds"]) == ("base", [1, 2])
    assert [row["task"] for row in floor["tasks"]] == ["fwe"]
    assert floor["overall"]["scores"][0] == results["overall"][0]["score"]
    assert results["multiplicity"]["overall"] == results["multiplicity"]["tasks"] == 2
    assert results["serving"]["context_tokens"] == 64
    assert all(row["decode_tokens_per_s"] > 0 for row in results["serving"]["models"])
    assert results["environment"]["engine"] == "transformers"
    assert any("text: crushed" in what for what, _, _ in told)
    whole = [(done, total) for what, done, total in told if what == "evaluation"]
    assert whole == sorted(whole), "the whole never goes back"
    assert whole[-1][0] == whole[-1][1]
    assert all(0 <= done <= total for _, done, total in told)


def test_one_model_alone_and_no_network(
    base: Path, compressed: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*args: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)
    alone = kvcompress_eval.run(base, limit=1, **options)
    assert [model["role"] for model in alone["models"]] == ["baseline"]
    assert [row["n"] for row in alone["tasks"]] == [1]
    assert alone["tasks"][0]["verdict"] is None
    assert alone["agreement"] == {}
    candidate = kvcompress_eval.run(compressed, limit=1, **options)
    assert [model["role"] for model in candidate["models"]] == ["candidate"]


class Counting(transformers_engine.TransformersEngine):
    """Counts what it is asked, and can fail on the way."""

    generated = 0
    scored = 0
    fail_after: int | None = None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if Counting.fail_after is not None and Counting.generated >= Counting.fail_after:
            raise KeyboardInterrupt
        Counting.generated += 1
        return super().generate(*args, **kwargs)

    def score(self, *args: Any, **kwargs: Any) -> Any:
        Counting.scored += 1
        return super().score(*args, **kwargs)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    monkeypatch.setattr(transformers_engine, "TransformersEngine", Counting)
    Counting.generated, Counting.scored, Counting.fail_after = 0, 0, None
    return Counting


def test_the_schema_is_the_documented_one() -> None:
    path = Path(__file__).parents[2] / "docs" / "results.schema.json"
    assert path.read_text("utf-8") == schema.json_schema(), (
        "python -m kvcompress_eval.schema > docs/results.schema.json"
    )


def test_an_unknown_field_is_no_result(base: Path, options: dict[str, Any]) -> None:
    results = kvcompress_eval.run(base, **{**options, "suite": Suite("", ("fwe",), (400,), 1)})
    schema.Results.model_validate(results)
    results["tasks"][0]["extra"] = 1
    with pytest.raises(ValueError, match="extra"):
        schema.Results.model_validate(results)


def test_rows_say_how_deep_the_answer_stands(base: Path, options: dict[str, Any]) -> None:
    options["suite"] = Suite("", ("niah_single_1", "fwe"), (400,), 6)
    results = kvcompress_eval.run(base, **options)
    assert {row["task"] for row in results["depths"]} == {"niah_single_1"}
    assert sum(row["n"] for row in results["depths"]) == 6
    rows = [
        json.loads(line) for line in (options["out"] / "samples/niah_single_1-400-base.jsonl").read_text().splitlines()
    ]
    tokenizer = TextTokenizer(base)
    made = generate(
        "niah_single_1", length=400, samples=6, seed=1, count=tokenizer.count, tokenizer_sha256=tokenizer.sha256
    )
    for row, sample in zip(rows, made, strict=True):
        assert row["depth"] % 10 == 0
        at = 100 * sample.prompt.index(sample.outputs[0]) / len(sample.prompt)
        assert abs(row["depth"] - at) <= 5
        assert tokenizer.decode(row["tokens"]) == row["prediction"]


def without_clock(results: dict[str, Any]) -> str:
    environment = {key: value for key, value in results["environment"].items() if key != "minutes"}
    return json.dumps({**results, "serving": None, "environment": environment}, sort_keys=True)


def test_an_interrupted_run_continues(
    base: Path, compressed: Path, options: dict[str, Any], counting: type[Counting], tmp_path: Path
) -> None:
    options["noise_floor"] = True
    whole = kvcompress_eval.run(compressed, baseline=base, **options)
    asked = counting.generated, counting.scored

    counting.generated, counting.scored, counting.fail_after = 0, 0, 1
    options["out"] = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        kvcompress_eval.run(compressed, baseline=base, **options)
    samples = options["out"] / "samples/fwe-400-base.jsonl"
    assert len(samples.read_text().splitlines()) == 1
    with samples.open("a") as file:
        file.write('{"index": 1, "prompt_sha')
    counting.fail_after = None
    resumed = kvcompress_eval.run(compressed, baseline=base, resume=True, **options)
    assert (counting.generated, counting.scored) == asked, "nothing is asked twice"
    assert without_clock(resumed) == without_clock(whole)

    counting.generated, counting.scored = 0, 0
    again = kvcompress_eval.run(compressed, baseline=base, resume=True, **options)
    assert (counting.generated, counting.scored) == (0, 0), "a finished run starts no engine"
    assert without_clock(again) == without_clock(whole)


def test_rows_of_another_run_are_not_reused(base: Path, options: dict[str, Any], counting: type[Counting]) -> None:
    options["suite"] = Suite(summary="", tasks=("fwe",), lengths=(400,), samples=2)
    kvcompress_eval.run(base, **options)
    assert counting.generated == 2
    kvcompress_eval.run(base, **options)
    assert counting.generated == 4, "without resume everything is run"
    kvcompress_eval.run(base, resume=True, samples=3, **options)
    assert counting.generated == 5, "more samples need only the new ones"
    options["seed"] = 2
    kvcompress_eval.run(base, resume=True, **options)
    assert counting.generated == 7
    kvcompress_eval.run(base, resume=True, full_generations=True, **options)
    assert counting.generated == 9


def test_full_generations_score_the_same(base: Path, options: dict[str, Any]) -> None:
    options["suite"] = Suite(summary="", tasks=("fwe",), lengths=(400,), samples=2)
    early = kvcompress_eval.run(base, **options)
    full = kvcompress_eval.run(base, full_generations=True, **options)
    assert early["tasks"] == full["tasks"]


def test_bad_input_is_refused_before_any_model_is_loaded(
    base: Path, compressed: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(running, "open_engine", load)

    def refused(match: str, model: Any = base, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            kvcompress_eval.run(model, **{**options, **changes})
        assert not options["out"].exists()

    refused("unknown engine", engine="onnx")
    refused("unknown suite 'slow'; known: quick", suite="slow")
    refused("unknown task 'niah_double'", tasks=["niah_double"])
    refused("expected positive numbers", samples=0)
    refused("expected positive numbers", lengths=[-1])
    refused("made for 2048 tokens", lengths=[4096])
    refused("decode speed after 2047 tokens does not fit", serving_context=2047)
    refused("unknown prompt template 'llama'", template="llama")
    refused("niah_single_2: .* name the file with --essay", tasks=["vt", "niah_single_2"])
    refused("no text file at", text=tmp_path / "missing.txt")
    refused("is a folder; expected a UTF-8 text file", text=tmp_path)
    refused("found --margin nan", margin=float("nan"))
    refused("found --margin -1", margin=-1)
    refused("found --dtype 'foo'", dtype="foo")
    refused("found --serving-context -5", serving_context=-5)
    (tmp_path / "taken").write_text("")
    for out in (tmp_path / "taken", tmp_path / "taken" / "deeper"):
        refused("taken is a file; expected a folder", out=out)
    refused("no engine that is named", engine="auto", engine_options={"cache": "int4"})
    refused("a URL serves one model", model=compressed, baseline=base, engine="http://127.0.0.1:9")
    refused("at least one model", model=[])
    (tmp_path / "empty").mkdir()
    refused("no config.json", model=tmp_path / "empty")
    refused("nothing to evaluate: niah_multikey_3 at 400: too short", suite=Suite("", ("niah_multikey_3",), (400,), 1))

    other = tmp_path / "other"
    shutil.copytree(base, other)
    train_tokenizer(other, 900, single_digits=False)
    refused("another tokenizer", model=other, baseline=base)


def test_the_tokens_a_tokenizer_adds_do_not_make_a_length_impossible(
    base: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = TextTokenizer(base)
    made = generate("fwe", length=400, samples=4, seed=1, count=tokenizer.count, tokenizer_sha256=tokenizer.sha256)
    context = max(sample.length for sample in made)
    tight = tmp_path / "tight"
    shutil.copytree(base, tight)
    (tight / "config.json").write_text(json.dumps(read_config(tight) | {"max_position_embeddings": context}))
    options["suite"] = Suite(summary="", tasks=("fwe",), lengths=(400,), samples=4)
    # The benchmark counts no beginning token, so the longest prompt and all its answer are one token too many.
    kvcompress_eval.run(tight, **options)
    rows = [json.loads(row) for row in (options["out"] / "samples/fwe-400-tight.jsonl").read_text().splitlines()]
    assert max(row["prompt_tokens"] for row in rows) + ruler_task("fwe").tokens_to_generate == context + 1
    assert max(row["prompt_tokens"] + row["predicted_tokens"] for row in rows) <= context


def test_questions_count_any_answer_and_name_their_file(base: Path, options: dict[str, Any], tmp_path: Path) -> None:
    options["suite"] = Suite(summary="", tasks=("qa_1",), lengths=(2048,), samples=2)
    sources = write_sources(tmp_path, questions=10, sentences_each=1)
    results = kvcompress_eval.run(base, sources=sources, **options)
    expected = hashlib.sha256(sources.path("squad").read_bytes()).hexdigest()
    assert results["environment"]["files"]["squad"] == expected
    assert results["environment"]["template"] == "base"
    rows = [json.loads(line) for line in (options["out"] / "samples/qa_1-2048-base.jsonl").read_text().splitlines()]
    assert [len(row["references"]) for row in rows] == [2, 2]
    unit = prepare(
        options["suite"],
        describe_models([base], None),
        TextTokenizer(base),
        seed=1,
        template=BASE,
        sources=sources,
        text=None,
        cache_dir=options["cache_dir"],
        serving_context=0,
        serving_tokens=0,
        progress=lambda *state: None,
    ).units[0]
    assert unit.score(rows[0]["references"][1], rows[0]["references"]) == 1.0
    assert unit.score("", rows[0]["references"]) == 0.0


def test_models_are_described(base: Path, compressed: Path, tmp_path: Path) -> None:
    twin = tmp_path / "compressed"
    shutil.copytree(compressed, twin)
    models = describe_models([compressed, twin], base)
    assert [model.name for model in models] == ["base", "compressed", "compressed-2"]
    assert [model.compressed for model in models] == [False, True, True]
    spec = codec_spec(read_config(compressed))
    assert spec is not None
    # 4 bits per channel and a gain of 2 bytes, per head, for keys and for values.
    expected = tiny.NUM_LAYERS * tiny.NUM_KV_HEADS * 2 * (tiny.HEAD_DIM // 2 + 2)
    assert bytes_per_token(read_config(compressed), spec) == expected
    assert bytes_per_token({"architectures": ["Unknown"]}, None) is None


def test_suites_name_known_tasks() -> None:
    for suite in SUITES.values():
        evaluate.choose_suite(suite)
    assert evaluate.choose_suite("ruler", lengths=[1024], limit=7).samples == 7
