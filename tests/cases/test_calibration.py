"""Calibration sources, tokenizers and chat templates as users bring them: right, or refused in one line before work."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvcompress.calibration import chat, corpus, tokenizer
from kvcompress.checkpoint.manifest import Manifest
from tests.cases.making import check_refusal, edit_json
from tests.command import Run

WORDS = "the cat sat on the mat and the rat ran "
LONG = WORDS * 30
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def compress(run: Run, model: Path, recipe_file: Path, tmp_path: Path) -> Any:
    """Compress the model; gives exit code and standard error."""

    def call(source: object = "builtin", *more: object) -> tuple[int, str]:
        out = ("-r", recipe_file, "--out", tmp_path / "out", "--samples", 4, "--length", 64)
        code, _, stderr = run("compress", model, *out, "--calibration", source, *more)
        assert (tmp_path / "out").is_dir() == (code == 0)
        assert not (tmp_path / "out.partial").exists()
        return code, stderr

    return call


def tokens(model: Path, source: Path, **options: Any) -> list[list[int]]:
    settings = {"samples": 4, "length": 32, "context": 64, "seed": 0} | options
    text = corpus.Corpus(str(source), tokenizer.load(model), 300, lambda *_: None)
    return text.sample(**settings).tokens_NT.tolist()


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Rows: the same tokens however they are written.

ROWS = [{"text": LONG + str(number)} for number in range(6)]
LINES = "\n".join(json.dumps(row) for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.JSONL", LINES),
        ("rows.NdJson", LINES),
        ("rows.json", json.dumps(ROWS)),
        ("rows.JSON", json.dumps(ROWS, indent=2)),
        ("strings.json", json.dumps([row["text"] for row in ROWS])),
        ("object.json", json.dumps({"rows": ROWS})),
        ("lines.json", LINES),
        ("crlf.jsonl", LINES.replace("\n", "\r\n") + "\r\n"),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("bom.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        ("blank.jsonl", "\n\n" + LINES.replace("\n", "\n \n\n") + "\n\n"),
        ("parts.jsonl", LINES.replace('"text"', '"messages": null, "text"')),
    ],
)
def test_rows_are_read_however_they_are_written(name: str, content: str | bytes, model: Path, tmp_path: Path) -> None:
    assert tokens(model, write(tmp_path / name, content)) == tokens(model, write(tmp_path / "plain.jsonl", LINES))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c", "\x1e", "\r", "\u0000"])
def test_only_a_line_feed_ends_a_line(separator: str, model: Path, tmp_path: Path) -> None:
    text = LONG + separator + LONG
    raw = json.dumps({"text": text}, ensure_ascii=False) if separator > "\x1f" else json.dumps({"text": text})
    found = tokens(model, write(tmp_path / "a.jsonl", raw), samples=1, length=400)
    reader = tokenizer.load(model)
    assert separator in reader.decode(found[0])
    assert found == tokens(model, write(tmp_path / "a.txt", text), samples=1, length=400)


def test_messages_are_rendered_in_the_models_template(model: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": [{"type": "text", "text": WORDS}]}]
    rows = write(tmp_path / "a.jsonl", json.dumps({"messages": messages}) + "\n")
    plain = tokenizer.load(model).decode(tokens(model, rows, samples=1, length=30)[0])
    assert plain.startswith("<|bos|>User: the cat")
    write(model / "chat_template.jinja", CHATML)
    rendered = tokenizer.load(model).decode(tokens(model, rows, samples=1, length=30)[0])
    assert rendered.startswith("<|bos|><|im_start|>user\nthe cat")


def test_long_files_are_thinned_evenly(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcompress.calibration.files.KEPT_CHARACTERS", 2000)
    rows = "".join(json.dumps({"text": f"{number:03d} cats"}) + "\n" for number in range(1000))
    found = tokenizer.load(model).decode(tokens(model, write(tmp_path / "a.jsonl", rows), samples=1, length=1000)[0])
    numbers = [int(word) for word in found.split() if word.isdigit() and len(word) == 3]
    steps = {second - first for first, second in itertools.pairwise(numbers)}
    assert len(steps) == 1
    assert steps.pop() in (4, 8)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, ["no calibration file", "none.txt"]),
        ("x" * 300, None, ["no calibration file"]),
        ("short.txt", "too short", ["short.txt", "at least 63"]),
        ("empty.jsonl", "", ["0 tokens"]),
        ("empty.json", " ", ["0 tokens"]),
        ("binary.txt", b"\xff\xfea\0", ["not UTF-8"]),
        ("cut.txt", LONG.encode() + b"\xe2\x80", ["not UTF-8"]),
        ("a.parquet", b"PAR1", [".parquet", ".jsonl"]),
        ("a.CSV", "text\n" + LONG, [".csv", ".jsonl"]),
        ("a.jsonl.gz", gzip.compress(LINES.encode()), [".gz", "unpack"]),
        ("a.txt", LINES, ["holds JSON", ".jsonl"]),
        ("a", json.dumps(ROWS), ["holds JSON", ".jsonl"]),
        ("a.log", b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=1).encode(), ["holds JSON"]),
        ("a.jsonl.bak", LINES, ["holds JSON"]),
        ("a.jsonl", json.dumps(ROWS, indent=1), ["line 1", "one row a line", ".json"]),
        ("a.jsonl", LINES + "\n{", ["line 7", "not JSON"]),
        ("a.jsonl", "[" * 200_000, ["line 1", "nested too deeply"]),
        ("a.json", "[" * 200_000, ["nested too deeply"]),
        ("a.jsonl", '{"input_ids": [' + "9" * 5000 + "]}", ["line 1"]),
        ("a.json", '{"text": ["a", "b"]}', ["a list in 'text'", "expected a string"]),
        ("a.json", "[1, 2, 3]", ["row 0", "found 1"]),
        ("a.json", "3", ["found 3", "'text'"]),
        ("a.json", "{", ["a.json", "not JSON"]),
        ("a.json", '{"data": []}', ["found 'data'"]),
        ("a.jsonl", '{"body": 1}', ["line 1", "found 'body'", "'text'"]),
        ("a.jsonl", "{}", ["line 1", "no keys"]),
        ("a.jsonl", "null", ["line 1", "found null"]),
        ("a.jsonl", '{"text": null}', ["line 1", "text is null"]),
        ("a.jsonl", '{"text": 5}', ["line 1", "'text'", "expected a string"]),
        ("a.jsonl", '{"text": "\\ud800"}', ["line 1", "surrogate"]),
        ("a.jsonl", '{"input_ids": [[1, 2]]}', ["line 1", "input_ids[0] is a list"]),
        ("a.jsonl", '{"input_ids": [1, null]}', ["line 1", "input_ids[1] is null"]),
        ("a.jsonl", '{"input_ids": [1, 2.0]}', ["line 1", "input_ids[1]", "2.0", "whole number"]),
        ("a.jsonl", '{"input_ids": [true]}', ["line 1", "input_ids[0] is true"]),
        ("a.jsonl", '{"input_ids": ["1"]}', ["line 1", "input_ids[0] is the string '1'"]),
        ("a.jsonl", '{"input_ids": [-1]}', ["line 1", "input_ids[0] is -1", "vocabulary of 300"]),
        ("a.jsonl", '{"input_ids": [1, 300]}', ["line 1", "input_ids[1] is 300", "vocabulary of 300"]),
        ("a.jsonl", '{"input_ids": [99999999999999999999999]}', ["line 1", "beyond 64 bits"]),
        ("a.jsonl", '{"input_ids": 7}', ["line 1", "found 7 in 'input_ids'"]),
        ("a.jsonl", '{"input_ids": {"0": 1}}', ["line 1", "found an object in 'input_ids'"]),
        ("a.jsonl", '{"input_ids": []}', ["0 tokens"]),
        ("a.jsonl", '{"messages": []}', ["line 1", "an empty list in 'messages'"]),
        ("a.jsonl", '{"messages": "hi"}', ["line 1", "in 'messages'"]),
        ("a.jsonl", '{"messages": ["hi"]}', ["line 1", "messages[0]", "'role'"]),
        ("a.jsonl", '{"messages": [{"role": null, "content": ""}]}', ["messages[0]", "null as 'role'"]),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', ["messages[0]", "null as 'content'"]),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', ["messages[0]", "'image'"]),
    ],
)
def test_bad_sources(name: str, content: str | bytes | None, words: list[str], compress: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        write(path, content)
    code, stderr = compress(path)
    check_refusal(code, stderr, *words)


def test_folders_are_refused(compress: Any, tmp_path: Path) -> None:
    check_refusal(*compress(tmp_path), "is a folder")
    check_refusal(*compress(""), "is a folder")


def test_a_negative_seed_is_refused(compress: Any) -> None:
    check_refusal(*compress("builtin", "--seed", -1), "seed -1", "0 or more")


# Tokenizers


def damaged(model: Path, /, **changes: Any) -> None:
    edit_json(model / "tokenizer.json", **changes)


def vocabulary(model: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((model / "tokenizer.json").read_text())["model"]
    return found


TOKENIZER_DAMAGE = {
    "newer pre-tokenizer": lambda m: damaged(m, pre_tokenizer={"type": "Newer"}),
    "newer model": lambda m: damaged(m, model={"type": "Newer"}),
    "no model": lambda m: damaged(m, model=None),
    "merge of unknown tokens": lambda m: damaged(m, model={**vocabulary(m), "merges": [["zz", "qq"]]}),
    "merge of one": lambda m: damaged(m, model={**vocabulary(m), "merges": ["a"]}),
    "merges a number": lambda m: damaged(m, model={**vocabulary(m), "merges": 5}),
    "vocabulary a string": lambda m: damaged(m, model={**vocabulary(m), "vocab": "x"}),
    "vocabulary empty": lambda m: damaged(m, model={**vocabulary(m), "vocab": {}, "merges": []}),
    "negative id": lambda m: damaged(m, model={**vocabulary(m), "vocab": {"a": -1}, "merges": []}),
    "huge ids": lambda m: damaged(m, model={**vocabulary(m), "vocab": {"a": 1 << 31, "b": 3}, "merges": []}),
    "added token of wrong type": lambda m: damaged(m, added_tokens=[{"id": "x", "content": 1}]),
    "a panic of Rust code": lambda m: damaged(m, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "a panic on text": lambda m: damaged(m, normalizer={"type": "Prepend", "prepend": ""}),
    "no unknown token": lambda m: damaged(
        m, model={"type": "WordLevel", "vocab": {"the": 0}, "unk_token": "<unk>"}, added_tokens=[]
    ),
    "a list": lambda m: write(m / "tokenizer.json", "[1]"),
    "not JSON": lambda m: write(m / "tokenizer.json", "{"),
    "empty": lambda m: write(m / "tokenizer.json", ""),
    "binary": lambda m: write(m / "tokenizer.json", b"\xff\xfe"),
    "missing": lambda m: (m / "tokenizer.json").unlink(),
    "config a list": lambda m: write(m / "tokenizer_config.json", "[1]"),
    "config not JSON": lambda m: write(m / "tokenizer_config.json", "{"),
    "bos a number": lambda m: edit_json(m / "tokenizer_config.json", bos_token=5),
    "class a number": lambda m: edit_json(m / "tokenizer_config.json", tokenizer_class=5),
    "length a string": lambda m: edit_json(m / "tokenizer_config.json", model_max_length="x"),
    "template without words": lambda m: edit_json(m / "tokenizer_config.json", chat_template=[{"name": 1}]),
    "auto_map a number": lambda m: edit_json(m / "tokenizer_config.json", auto_map=5),
}


@pytest.mark.parametrize("damage", TOKENIZER_DAMAGE)
def test_tokenizers_that_cannot_be_read(damage: str, compress: Any, model: Path) -> None:
    TOKENIZER_DAMAGE[damage](model)
    code, stderr = compress()
    check_refusal(code, stderr, "tokenizer", str(model))


def test_sentencepiece_alone_that_cannot_be_read(compress: Any, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    write(model / "tokenizer.model", b"junk")
    edit_json(model / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    check_refusal(*compress(), "tokenizer", str(model))


def test_tokenizer_of_another_model(compress: Any, model: Path) -> None:
    found = json.loads((model / "tokenizer.json").read_text())
    last = {"id": 300, "content": " cat", "special": False, "single_word": False, "lstrip": False, "rstrip": False}
    damaged(model, added_tokens=[*found["added_tokens"], {**last, "id": 277, "normalized": False}])
    edit_json(model / "tokenizer_config.json", bos_token="<|new|>")
    assert compress()[0] == 0  # ids beyond the trained ones, but inside the embedding


def test_first_token_outside_the_vocabulary(compress: Any, model: Path) -> None:
    added = [{"id": 0, "content": "<|bos|>"}, *({"id": at, "content": f"<|{at}|>"} for at in range(277, 330))]
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    damaged(model, added_tokens=[{**flags, **token} for token in added])
    edit_json(model / "tokenizer_config.json", bos_token="<|320|>")
    check_refusal(*compress(), "'<|320|>'", "320", "vocabulary of 300")


def test_tokenizer_that_knows_no_word_of_it(compress: Any, model: Path) -> None:
    words = {"<unk>": 0, "the": 1, "<|bos|>": 2, "<|eos|>": 3}
    damaged(model, model={"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}, added_tokens=[])
    edit_json(model / "tokenizer_config.json", unk_token="<unk>")
    check_refusal(*compress(), "knows too little", "'<unk>'")


@pytest.mark.parametrize("with_class", [True, False])
def test_code_of_the_checkpoint_is_never_run_and_never_asked_for(
    with_class: bool, model: Path, recipe_file: Path, tmp_path: Path
) -> None:
    """On a terminal, where transformers would ask: its answer there is y."""
    ran = tmp_path / "ran"
    write(model / "code.py", f"open({str(ran)!r}, 'w')\nclass T: pass\n")
    auto_map = {"AutoTokenizer": ["code.T", "code.T"]}
    edit_json(model / "tokenizer_config.json", auto_map=auto_map)
    edit_json(model / "config.json", auto_map={"AutoConfig": "code.T", "AutoModelForCausalLM": "code.T", **auto_map})
    if not with_class:
        edit_json(model / "tokenizer_config.json", tokenizer_class="T")
    terminal, theirs = pty.openpty()
    os.write(terminal, b"y\n" * 20)
    command = [sys.executable, "-m", "kvcompress_cli", "compress", model, "-r", recipe_file, "--out", tmp_path / "out"]
    done = subprocess.run(
        [*map(str, command), "--samples", "2", "--length", "32"],
        stdin=theirs,
        capture_output=True,
        text=True,
        timeout=120,
    )
    os.close(terminal)
    os.close(theirs)
    assert not ran.exists()
    assert "[y/N]" not in done.stdout + done.stderr
    if done.returncode:
        check_refusal(done.returncode, done.stderr, "tokenizer", str(model))
    else:
        assert (tmp_path / "out" / "code.py").read_bytes() == (model / "code.py").read_bytes()


# Chat templates

ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
)
BAD_TEMPLATES = {
    "raises": ("{{ raise_exception('never') }}", "never"),
    "syntax": ("{% for m in messages %}", "TemplateSyntaxError"),
    "missing variable": ("{{ messages[0].content + date_string.year }}", "UndefinedError"),
    "needs tools": ("{% if not tools %}{{ raise_exception('give tools') }}{% endif %}", "give tools"),
    "needs a system message": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}",
        "system first",
    ),
    "says nothing": ("{# nothing #}", "makes no text"),
    "too long a loop": ("{% for a in range(99999999) %}x{% endfor %}", "OverflowError"),
    "too much text": ("{{ messages[0].content }}{% for a in range(99999) %}{{ 'x' * 99 }}{% endfor %}", "characters"),
    "never done": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}x",
        "not done after",
    ),
    "division": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "includes a file": ("{% include '/etc/passwd' %}", "TypeError"),
    "escapes the sandbox": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
}
HELLO = json.dumps({"messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": LONG}]}) + "\n"


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_templates_that_fail(
    name: str, compress: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused where the user's rows are conversations; the built-in ones become plain text, and one line says so."""
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    template, words = BAD_TEMPLATES[name]
    write(model / "chat_template.jinja", template)
    check_refusal(*compress(write(tmp_path / "a.jsonl", HELLO)), "a.jsonl line 1", "chat template", words)
    code, stderr = compress()
    assert code == 0
    assert [line for line in stderr.splitlines() if "taking dialogue as plain text" in line]


@pytest.mark.parametrize("silent", [{"content": None}, {}])
def test_a_call_of_tools_without_words(silent: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """As chat services write it: no content, or null, beside tool_calls."""
    edit_json(model / "tokenizer_config.json", chat_template=CHATML)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    asked = {"role": "user", "content": LONG}

    def cut(answer: dict[str, Any]) -> list[list[int]]:
        rows = write(tmp_path / "rows.jsonl", json.dumps({"messages": [asked, call | answer]}))
        return tokens(model, rows)

    assert cut(silent) == cut({"content": ""})


@pytest.mark.parametrize("template", [5, {"tool_use": "x"}, [{"name": "rag", "template": "x"}], ["x"], {"default": 5}])
def test_templates_of_odd_shapes(template: Any, compress: Any, model: Path, tmp_path: Path) -> None:
    edit_json(model / "tokenizer_config.json", chat_template=template)
    check_refusal(*compress(write(tmp_path / "a.jsonl", HELLO)), str(model))


def test_named_templates(model: Path) -> None:
    named = {"default": CHATML, "tool_use": "tools: {{ tools | length }} {{ messages[0].content }}"}
    edit_json(
        model / "tokenizer_config.json", chat_template=[{"name": key, "template": text} for key, text in named.items()]
    )
    reader = tokenizer.load(model)
    messages = [{"role": "user", "content": "hi"}]
    assert chat.render(reader, messages, open_answer=True).endswith("<|im_start|>assistant\n")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert chat.render(reader, messages, tools=tools) == "tools: 1 hi"


def test_a_template_that_tells_the_date_says_the_same_every_day(model: Path) -> None:
    write(model / "chat_template.jinja", "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}")
    assert chat.render(tokenizer.load(model), [{"role": "user", "content": "hi"}]) == "01 Jan 2026: hi"


def test_a_template_that_forbids_the_system_role(model: Path) -> None:
    write(model / "chat_template.jinja", ALTERNATING)
    dialogues = chat.Dialogues(tokenizer.load(model))
    asked = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    assert dialogues.render(asked) == "[user] hello\n[assistant] hi\n"
    assert dialogues.note is None
    assert dialogues.render([{"role": "system", "content": "be kind"}, *asked]) == "[user] hello\n[assistant] hi\n"
    assert dialogues.note is not None
    assert "without system messages" in dialogues.note


def test_additional_templates_come_along_byte_for_byte(compress: Any, run: Run, model: Path, tmp_path: Path) -> None:
    write(model / "chat_template.jinja", CHATML)
    (model / "additional_chat_templates").mkdir()
    odd = write(model / "additional_chat_templates" / "tool_use.jinja", b"{{ tools }}\r\n\xc3\xa9 ")
    assert compress()[0] == 0
    assert run("verify", tmp_path / "out")[0] == 0
    assert run("decompress", tmp_path / "out", "--out", tmp_path / "plain")[0] == 0
    for folder in ("out", "plain"):
        copied = tmp_path / folder / "additional_chat_templates" / "tool_use.jinja"
        assert copied.read_bytes() == odd.read_bytes()
        assert tokenizer.load(tmp_path / folder).chat_template.keys() == {"default", "tool_use"}


# Text of the model's own


def test_self_is_recorded_and_the_same_every_time(compress: Any, model: Path, tmp_path: Path) -> None:
    write(model / "chat_template.jinja", CHATML)
    code, stderr = compress("self")
    assert code == 0
    assert "sampling calibration text" in stderr
    first = Manifest.load(tmp_path / "out")
    assert first.calibration is not None
    assert first.calibration.name == "self"
    assert first.calibration.sampling == {"temperature": 1.0, "top_p": 0.95, "top_k": 512}
    os.rename(tmp_path / "out", tmp_path / "first")
    assert compress("self")[0] == 0
    assert Manifest.load(tmp_path / "out").sha256 == first.sha256
