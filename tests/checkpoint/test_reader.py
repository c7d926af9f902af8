"""Opening checkpoints: what is read, and one clear sentence for everything that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvcompress.checkpoint.reader import Checkpoint, is_compressed, refuse_compressed

Maker = Callable[..., Path]
INDEX = "model.safetensors.index.json"


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_single_file_equals_official_library(make_checkpoint: Maker) -> None:
    folder = make_checkpoint()
    checkpoint = Checkpoint.open(folder)
    expected = load_file(folder / "model.safetensors")
    assert checkpoint.shards == ["model.safetensors"]
    assert checkpoint.index is None
    assert checkpoint.config["hidden_size"] == 8
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.read(name).dtype == tensor.dtype
    assert checkpoint.largest_tensor_bytes == max(t.nbytes for t in expected.values())
    assert checkpoint.weights_bytes == sum(t.nbytes for t in expected.values())


def test_shards_equal_official_library(make_checkpoint: Maker) -> None:
    folder = make_checkpoint(shards=3)
    checkpoint = Checkpoint.open(str(folder))
    assert len(checkpoint.shards) == 3
    for shard in checkpoint.shards:
        for name, tensor in load_file(folder / shard).items():
            assert checkpoint.tensors[name].file == shard
            assert torch.equal(checkpoint.read(name), tensor)


def test_reading_an_unknown_tensor_names_it(make_checkpoint: Maker) -> None:
    with pytest.raises(ValueError, match=r"has no tensor 'nope'"):
        Checkpoint.open(make_checkpoint()).read("nope")


def test_opening_does_not_import_torch(make_checkpoint: Maker, child_environment: dict[str, str]) -> None:
    code = (
        "import sys; from kvcompress.checkpoint.reader import Checkpoint; "
        f"assert Checkpoint.open({str(make_checkpoint())!r}).tensors; "
        "print([m for m in ('torch', 'transformers', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_no_config(make_checkpoint: Maker) -> None:
    folder = make_checkpoint()
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[1]", "holds a JSON list; expected an object"), ("[" * 10**5, "nested too deeply")],
)
def test_bad_config(make_checkpoint: Maker, text: str, message: str) -> None:
    folder = make_checkpoint()
    (folder / "config.json").write_text(text)
    assert message in refusal(folder)


def test_no_weights(make_checkpoint: Maker) -> None:
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    assert "has no safetensors weights" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_only(make_checkpoint: Maker, name: str) -> None:
    folder = make_checkpoint()
    (folder / "model.safetensors").rename(folder / name)
    message = refusal(folder)
    assert f"has pickle weights only ('{name}')" in message
    assert "convert the checkpoint to safetensors" in message


def test_shards_without_index(make_checkpoint: Maker) -> None:
    folder = make_checkpoint(shards=2)
    (folder / INDEX).unlink()
    assert "has 'model-00001-of-00002.safetensors' but neither" in refusal(folder)


def test_truncated_shard(make_checkpoint: Maker) -> None:
    folder = make_checkpoint(shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-10])
    assert f"{shard} is truncated: found {size - 10} bytes, its header describes {size}" in refusal(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "", "a\\b", "./x"])
def test_index_naming_a_file_outside(make_checkpoint: Maker, name: str) -> None:
    folder = make_checkpoint(shards=2)
    save_file({"t": torch.ones(1)}, folder.parent / "x.safetensors")
    edit_index(folder, lambda weight_map: weight_map.update({"t": name}))
    message = refusal(folder)
    assert f"{INDEX} names the file {name!r}, which is not a path inside the checkpoint folder" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sub/x.safetensors", "expected a file directly in the checkpoint folder"),
        ("x.bin", "expected *.safetensors files only"),
        ("x.safetensors", "which is not in the folder; download it again"),
    ],
)
def test_index_naming_a_wrong_file(make_checkpoint: Maker, name: str, message: str) -> None:
    folder = make_checkpoint(shards=2)
    edit_index(folder, lambda weight_map: weight_map.update({"t": name}))
    assert message in refusal(folder)


def test_index_naming_an_absent_tensor(make_checkpoint: Maker) -> None:
    folder = make_checkpoint(shards=2)
    edit_index(folder, lambda weight_map: weight_map.update({"ghost": "model-00001-of-00002.safetensors"}))
    assert "says that 'model-00001-of-00002.safetensors' holds tensor 'ghost', but it does not" in refusal(folder)


def test_tensor_in_two_shards(make_checkpoint: Maker) -> None:
    folder = make_checkpoint(shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    save_file(load_file(first) | load_file(second), second)
    assert "in both 'model-00001-of-00002.safetensors' and 'model-00002-of-00002.safetensors'" in refusal(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_index_without_weight_map(make_checkpoint: Maker, index: str) -> None:
    folder = make_checkpoint(shards=2)
    (folder / INDEX).write_text(index)
    assert "has no weight_map" in refusal(folder)


def test_index_with_something_other_than_names(make_checkpoint: Maker) -> None:
    folder = make_checkpoint(shards=2)
    (folder / INDEX).write_text('{"weight_map": {"a": 1}}')
    assert "something other than file names" in refusal(folder)


def test_single_file_beside_an_index(make_checkpoint: Maker) -> None:
    folder = make_checkpoint(shards=2)
    save_file({"t": torch.ones(1)}, folder / "model.safetensors")
    assert "has both model.safetensors and model.safetensors.index.json" in refusal(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_link_that_leaves_the_folder(make_checkpoint: Maker, name: str) -> None:
    folder = make_checkpoint()
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    assert f"{name} is a link to {outside}, outside the checkpoint folder" in refusal(folder)


def test_link_loop(make_checkpoint: Maker) -> None:
    folder = make_checkpoint()
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "config.json")
    assert "config.json" in refusal(folder)


def test_hub_cache_links_are_followed(make_checkpoint: Maker, tmp_path: Path) -> None:
    """Both layouts: blobs of the model, and blobs of the model that link to the store all models share."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "abc123"
    make_checkpoint("hub/models--org--name/snapshots/abc123")
    (repository / "blobs").mkdir()
    (tmp_path / "hub" / "blobs" / "4f").mkdir(parents=True)
    (snapshot / "config.json").rename(repository / "blobs" / "c0ffee")
    (snapshot / "config.json").symlink_to("../../blobs/c0ffee")
    (snapshot / "model.safetensors").rename(tmp_path / "hub" / "blobs" / "4f" / "beef")
    (repository / "blobs" / "beef").symlink_to("../../blobs/4f/beef")
    (snapshot / "model.safetensors").symlink_to("../../blobs/beef")
    assert len(Checkpoint.open(snapshot).tensors) == 6

    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../secret")
    assert "outside the checkpoint folder" in refusal(snapshot)


def test_compressed_checkpoints_are_recognised(make_checkpoint: Maker) -> None:
    folder = make_checkpoint()
    refuse_compressed(Checkpoint.open(folder))
    assert not is_compressed({"quantization_config": {"quant_method": "gptq"}})
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "kvcompress"}}')
    with pytest.raises(ValueError, match=r"already compressed by kvcompress; use the base model .* decompress"):
        refuse_compressed(Checkpoint.open(folder))
