"""Copying and transforming shards; side files; new tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvcompress.checkpoint.digests import Digests, split_key, tensor_key
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.safetensors_file import TensorInfo, TensorSpec, read_header
from kvcompress.checkpoint.workdir import WorkDir
from kvcompress.checkpoint.writer import copy_shards, copy_side_files, is_side_file, write_file, write_tensors

Maker = Callable[..., Path]
INDEX = "model.safetensors.index.json"


class Halve:
    """Splits every even layer into a factor pair, drops layer 1 and copies the rest."""

    def plan(self, info: TensorInfo) -> Sequence[TensorSpec] | None:
        layer = int(info.name.split(".")[2])
        if layer == 1:
            return []
        if layer % 2:
            return None
        return [
            TensorSpec(f"{info.name}.codes", "I8", (3,)),
            TensorSpec(f"{info.name}.rows", info.dtype, (info.shape[0] // 2, info.shape[1])),
        ]

    def apply(self, name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        if int(name.split(".")[2]) == 1:
            return
        yield f"{name}.rows", tensor[: tensor.shape[0] // 2]
        yield f"{name}.codes", torch.arange(3, dtype=torch.int8)


def check_digests(folder: Path, digests: Digests) -> None:
    """Digests cover every safetensors file, header and tensor, and agree with the bytes."""
    found_headers, found_tensors = {}, {}
    for path in folder.glob("*.safetensors"):
        raw, header = path.read_bytes(), read_header(path)
        found_headers[path.name] = sha256(raw[: header.nbytes]).hexdigest()
        for info in header.tensors.values():
            data = raw[info.offset : info.offset + info.nbytes]
            found_tensors[tensor_key(path.name, info.name)] = sha256(data).hexdigest()
    assert (found_headers, found_tensors) == (digests.headers, digests.tensors)
    for name, expected in digests.files.items():
        assert sha256((folder / name).read_bytes()).hexdigest() == expected


def copy(folder: Path, out: Path, transform: Halve | None = None) -> tuple[Digests, int]:
    done: list[int] = []
    with WorkDir.open(out, {}) as work:
        digests = copy_shards(Checkpoint.open(folder), work, transform, done.append)
        digests |= write_file(work, "config.json", b"{}")
        work.publish()
    return digests, sum(done)


def test_single_file_is_copied_exactly(make_checkpoint: Maker, tmp_path: Path) -> None:
    folder = make_checkpoint()
    digests, progress = copy(folder, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert progress == (folder / "model.safetensors").stat().st_size
    check_digests(tmp_path / "out", digests)


def test_shards_are_copied_exactly_and_indexed(make_checkpoint: Maker, tmp_path: Path) -> None:
    folder = make_checkpoint(shards=3)
    digests, _ = copy(folder, tmp_path / "out")
    for shard in Checkpoint.open(folder).shards:
        assert (tmp_path / "out" / shard).read_bytes() == (folder / shard).read_bytes()
    index, before = (json.loads((path / INDEX).read_text()) for path in (tmp_path / "out", folder))
    assert index["weight_map"] == before["weight_map"]
    assert index["metadata"] == {"total_size": Checkpoint.open(folder).weights_bytes, "note": "kept"}
    check_digests(tmp_path / "out", digests)
    assert digests.files.keys() == {INDEX, "config.json"}


@pytest.mark.parametrize("shards", [1, 3])
def test_transformed_shards_load_with_the_official_library(make_checkpoint: Maker, tmp_path: Path, shards: int) -> None:
    folder = make_checkpoint(shards=shards)
    digests, _ = copy(folder, tmp_path / "out", Halve())
    before, after = Checkpoint.open(folder), Checkpoint.open(tmp_path / "out")
    found = {name: tensor for path in after.shards for name, tensor in load_file(tmp_path / "out" / path).items()}
    expected: dict[str, torch.Tensor] = {}
    for name in before.tensors:
        layer, tensor = int(name.split(".")[2]), before.read(name)
        if layer % 2 == 0:
            expected |= {f"{name}.rows": tensor[: len(tensor) // 2], f"{name}.codes": torch.arange(3, dtype=torch.int8)}
        elif layer != 1:
            expected[name] = tensor
    assert found.keys() == expected.keys() == after.tensors.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    with safe_open(tmp_path / "out" / after.shards[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    check_digests(tmp_path / "out", digests)
    if shards > 1:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["weight_map"] == {name: info.file for name, info in sorted(after.tensors.items())}
        assert index["metadata"]["total_size"] == after.weights_bytes


def test_a_transform_that_breaks_its_plan_is_caught(make_checkpoint: Maker, tmp_path: Path) -> None:
    class Wrong(Halve):
        def apply(self, name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
            yield f"{name}.rows", tensor

    with pytest.raises(AssertionError, match="not as planned"):
        copy(make_checkpoint(), tmp_path / "out", Wrong())


def test_finished_shards_are_not_written_again(make_checkpoint: Maker, tmp_path: Path) -> None:
    folder = make_checkpoint(shards=3)
    checkpoint = Checkpoint.open(folder)
    with WorkDir.open(tmp_path / "out", {}) as work:
        first = copy_shards(checkpoint, work)
        stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial" / "tree").iterdir()}
    done: list[int] = []
    with WorkDir.open(tmp_path / "out", {}, resume=True) as work:
        assert copy_shards(checkpoint, work, progress=done.append) == first
        assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert sum(done) == sum(header.file_bytes for header in checkpoint.headers.values())


@pytest.mark.parametrize("transform", [None, Halve()])
def test_input_that_shrinks_meanwhile_is_refused(
    make_checkpoint: Maker, tmp_path: Path, transform: Halve | None
) -> None:
    folder = make_checkpoint()
    checkpoint = Checkpoint.open(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-200])
    with (
        pytest.raises(ValueError, match=r"became shorter while it was read|ended while tensor"),
        WorkDir.open(tmp_path / "out", {}) as work,
    ):
        copy_shards(checkpoint, work, transform)
    assert not (tmp_path / "out.partial").exists()


def test_input_whose_header_changes_meanwhile_is_refused(make_checkpoint: Maker, tmp_path: Path) -> None:
    folder = make_checkpoint()
    checkpoint = Checkpoint.open(folder)
    save_file({"other": torch.ones(4000)}, folder / "model.safetensors")
    with (
        pytest.raises(ValueError, match="changed while it was read"),
        WorkDir.open(tmp_path / "out", {}) as work,
    ):
        copy_shards(checkpoint, work)


def test_side_files(make_checkpoint: Maker, tmp_path: Path) -> None:
    folder = make_checkpoint()
    for name in ("pytorch_model.bin", "optimizer.pt", ".gitattributes", "tf_model.h5", "consolidated.safetensors"):
        (folder / name).touch()
    (folder / "original").mkdir()
    (folder / "original" / "params.json").touch()
    (folder / "tokenizer.model").write_bytes(bytes(range(256)))
    nested = {
        "additional_chat_templates/tool_use.jinja",
        "additional_chat_templates/rag.jinja",
        "tokenizer/spm/base.model",
        "prompts/system.jinja",
        "words/list.txt",
    }
    left = {
        ".git/HEAD", "onnx/tokenizer/vocab.txt", "checkpoint-9/chat_template.jinja", "checkpoint-9/model.safetensors",
        "runs/events.txt", "additional_chat_templates/.cache/x.jinja", "words/other.txt", "draft/config.json",
        "draft/tokenizer.json", "draft/x.jinja",
    }  # fmt: skip
    for name in nested | left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "tokenizer_config.json").write_text('{"a": [{"dictionary": "words/list.txt"}]}')
    with WorkDir.open(tmp_path / "out", {}) as work:
        digests = copy_side_files(Checkpoint.open(folder), work)
        work.publish()
    expected = nested | {
        "LICENSE", "chat_template.jinja", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
    }  # fmt: skip
    written = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert written == digests.files.keys() == expected
    for name in expected:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    check_digests(tmp_path / "out", digests)
    assert not is_side_file("pytorch_model.bin.index.json")


def test_side_file_that_is_a_link_to_elsewhere_is_refused(make_checkpoint: Maker, tmp_path: Path) -> None:
    folder = make_checkpoint()
    (tmp_path / "secret").write_text("s")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="outside the checkpoint folder"), WorkDir.open(tmp_path / "out", {}) as work:
        copy_side_files(Checkpoint.open(folder), work)


def test_new_files_and_tensors(tmp_path: Path) -> None:
    tensors = {"layers.0.k.basis": torch.randn(2, 3), "layers.0.k.mean": torch.ones(3, dtype=torch.float16)}
    with WorkDir.open(tmp_path / "out", {}) as work:
        digests = write_tensors(work, "kvcompress/codec.safetensors", tensors)
        digests |= write_file(work, "config.json", b"{}")
        assert work.done("tensors:kvcompress/codec.safetensors")
        work.publish()
    found = load_file(tmp_path / "out" / "kvcompress" / "codec.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert {split_key(key) for key in digests.tensors} == {("kvcompress/codec.safetensors", name) for name in tensors}
    assert digests.headers.keys() == {"kvcompress/codec.safetensors"}
    assert digests.files == {"config.json": sha256(b"{}").hexdigest()}
