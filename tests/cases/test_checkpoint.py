"""Weights, file names and folders as users bring them: right, or refused in one line before work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvcompress.checkpoint.manifest import Manifest
from kvcompress.checkpoint.verify import verify
from tests.cases.making import check_refusal, edit_json
from tests.command import Run

Compress = Callable[..., tuple[int, str, str]]


def edit_tensors(model: Path, **tensors: torch.Tensor | None) -> None:
    path = model / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if name not in tensors}
    save_file(kept | {name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


def split(model: Path, **index: str) -> None:
    """Two shards and their index, with more entries than there are tensors."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, model / shard, {"format": "pt"})
    weight_map = {name: shard for shard, held in shards.items() for name in held} | index
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("bias", "key"), [("self_attn.k_proj", "attention_bias"), ("mlp.up_proj", "mlp_bias"), ("self_attn.o_proj", "att")]
)
def test_a_bias_that_no_engine_would_add(bias: str, key: str, compress: Compress, model: Path) -> None:
    name = f"model.layers.0.{bias}.bias"
    edit_tensors(model, **{name: torch.ones(128)})
    code, _, stderr = compress()
    check_refusal(code, stderr, name, key)


@pytest.mark.parametrize(("out", "words"), [("/", "inside it"), ("{}/config.json/out", "which is a file")])
def test_a_place_that_cannot_hold_an_output(out: str, words: str, run: Run, model: Path, recipe_file: Path) -> None:
    code, _, stderr = run("compress", model, "--recipe", recipe_file, "--out", out.format(model))
    check_refusal(code, stderr, words)


def test_a_full_disk_is_told_before_the_weights_are_read(compress: Compress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    code, _, stderr = compress()
    check_refusal(code, stderr, "not enough disk space", "choose another output folder")


@pytest.mark.parametrize("missing", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_a_tensor_that_calibration_would_not_miss(missing: str, compress: Compress, model: Path) -> None:
    edit_tensors(model, **{missing: None})
    code, _, stderr = compress()
    check_refusal(code, stderr, missing, str(model))


def test_a_tied_head_that_only_the_index_has(compress: Compress, model: Path, tmp_path: Path) -> None:
    edit_json(model / "config.json", tie_word_embeddings=True)
    edit_tensors(model, **{"lm_head.weight": None})
    split(model, **{"lm_head.weight": "model-1.safetensors"})
    code, _, stderr = compress()
    assert code == 0, stderr
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    assert verify(tmp_path / "out").ok


def test_a_head_of_its_own_that_only_the_index_has(compress: Compress, model: Path) -> None:
    edit_tensors(model, **{"lm_head.weight": None})
    split(model, **{"lm_head.weight": "model-1.safetensors"})
    code, _, stderr = compress()
    check_refusal(code, stderr, "'lm_head.weight'", "download")


def test_an_adapter_beside_whole_weights(compress: Compress, model: Path) -> None:
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    code, _, stderr = compress()
    check_refusal(code, stderr, "adapter_config.json", "merge")


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number(name: str, value: float, compress: Compress, model: Path) -> None:
    weight = load_file(model / "model.safetensors")[name]
    weight.view(-1)[-1] = value
    edit_tensors(model, **{name: weight})
    code, _, stderr = compress()
    check_refusal(code, stderr, name, "not a number")


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "additional_chat_templates/tool_use.jinja"])
def test_a_link_out_of_the_folder(name: str, compress: Compress, model: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    path = model / name
    path.parent.mkdir(exist_ok=True)
    elsewhere.write_bytes(path.read_bytes() if path.is_file() else b"text")
    path.unlink(missing_ok=True)
    path.symlink_to(elsewhere)
    code, _, stderr = compress()
    check_refusal(code, stderr, name, "link")


@pytest.mark.parametrize(
    ("name", "word"), [("a::b.txt", "a::b"), ("a\\b.txt", "a\\\\b"), (os.fsdecode(b"caf\xe9.txt"), "not Unicode")]
)
def test_a_name_that_a_manifest_cannot_hold(name: str, word: str, compress: Compress, model: Path) -> None:
    (model / name).write_text("text")
    code, _, stderr = compress()
    check_refusal(code, stderr, word)


@pytest.mark.parametrize("name", ["n" * 250 + ".txt", "n" * 255, "with space.txt", "zw\u00f6lf.md", "line\nbreak.txt"])
def test_names_that_are_only_unusual(name: str, compress: Compress, model: Path, tmp_path: Path) -> None:
    (model / name).write_text("text")
    code, _, stderr = compress()
    assert code == 0, stderr
    assert (tmp_path / "out" / name).read_text() == "text"
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize(
    "device", [*(["cuda"] if not torch.cuda.is_available() else []), "cuda:7", "gpu", "mps", "", "meta", "cuda:-1"]
)
def test_devices_that_are_not_there(device: str, compress: Compress) -> None:
    code, _, stderr = compress("--device", device)
    check_refusal(code, stderr, repr(device))


@pytest.mark.parametrize("memory", ["inf", "nan", "-1", "0", "1e300"])
def test_memory_that_nobody_has(memory: str, run: Run, model: Path, recipe_file: Path) -> None:
    code, _, stderr = run("plan", model, "--recipe", recipe_file, f"--memory={memory}")
    check_refusal(code, stderr, "--memory")


@pytest.mark.parametrize("length", [248, 256, 5000])
def test_an_output_whose_name_is_too_long(length: int, compress: Compress, tmp_path: Path) -> None:
    code, _, stderr = compress(out=tmp_path / ("o" * length))
    check_refusal(code, stderr, "name")


def test_the_longest_output_name(compress: Compress, tmp_path: Path) -> None:
    code, _, stderr = compress(out=tmp_path / ("o" * 247))
    assert code == 0, stderr


def test_a_home_folder_is_found(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kvcompress serve '~/m'`: vLLM is handed the folder that was checked."""
    from kvcompress_cli import serve

    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, stderr = run("serve", "~/model")
    check_refusal(code, stderr, "not compressed")
    assert serve._model("~/model", model) == str(model)
    assert serve._model("org/name", model) == "org/name"
    code, _, stderr = run("plan", "~nobody-of-that-name/model", "--recipe", tmp_path / "none.yaml")
    assert code == 2


def test_what_was_finished_is_kept_when_a_late_file_is_refused(
    compress: Compress, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvcompress.checkpoint import writer

    def refuse(*_: Any) -> None:
        raise ValueError("a file that nobody could foresee")

    monkeypatch.setattr(writer, "copy_side_files", refuse)
    code, _, stderr = compress()
    assert code == 2
    assert "nobody could foresee; what was finished is kept" in stderr.splitlines()[-1]
    monkeypatch.undo()


def test_an_error_that_nobody_foresaw_is_one_line(compress: Compress, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcompress.pipeline import plan

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(plan, "make", fail)
    code, _, stderr = compress()
    check_refusal(code, stderr, "unexpected RuntimeError: first second", "--debug")


def test_manifest_of_a_sound_model(compress: Compress, tmp_path: Path) -> None:
    code, _, stderr = compress()
    assert code == 0, stderr
    assert Manifest.load(tmp_path / "out").bytes_per_token.ratio > 2


def test_weights_so_large_that_their_squares_overflow(compress: Compress, model: Path) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    edit_tensors(model, **{name: load_file(model / "model.safetensors")[name] * 1e30})
    code, _, stderr = compress()
    assert code == 2
    assert "error: layer 1" in stderr.splitlines()[-1]


def test_a_path_that_is_too_long(run: Run, recipe_file: Path) -> None:
    code, _, stderr = run("plan", "/" + "m" * 300, "--recipe", recipe_file)
    check_refusal(code, stderr, "no folder", "check the path")


def test_tensors_of_unusual_shapes_are_carried_along(compress: Compress, model: Path, tmp_path: Path) -> None:
    """Older files hold more than a model asks for: rotary frequencies, scalars, tensors without elements."""
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
        "model.scalar": torch.tensor(3, dtype=torch.int64),
        "model.empty": torch.zeros(0, 8, dtype=torch.float16),
    }
    edit_tensors(model, **extra)
    code, _, stderr = compress()
    assert code == 0, stderr
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in extra.items())


def test_one_shard_with_an_index(compress: Compress, model: Path, tmp_path: Path) -> None:
    weight_map = dict.fromkeys(load_file(model / "model.safetensors"), "model.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    code, _, stderr = compress()
    assert code == 0, stderr
    assert verify(tmp_path / "out").ok


def test_a_link_to_nowhere_is_no_file(compress: Compress, model: Path, tmp_path: Path) -> None:
    (model / "NOTES.md").symlink_to(model / "gone.md")
    code, _, stderr = compress()
    assert code == 0, stderr
    assert not (tmp_path / "out" / "NOTES.md").exists()
