"""Small checkpoints, made with the official safetensors library, and the environment for child processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import kvcompress
from kvcompress.checkpoint.digests import Digests
from kvcompress.checkpoint.manifest import (
    MANIFEST_FILE,
    BytesPerToken,
    Calibration,
    Manifest,
    Parent,
    Sizes,
    fingerprint,
)
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.workdir import WorkDir
from kvcompress.checkpoint.writer import copy_shards, copy_side_files, write_file, write_tensors

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}
CheckpointMaker = Callable[..., Path]


def example_tensors(count: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of several dtypes and odd sizes, named like a model's."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
    return {
        f"model.layers.{i}.weight": (torch.randn(5 + i, 7, generator=generator) * 9).to(dtypes[i % len(dtypes)])
        for i in range(count)
    }


def write_checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1) -> Path:
    """A checkpoint folder with config, tokenizer and card; with an index where it has several shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("terms")
    (folder / "README.md").write_text("card")
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        mine = {name: tensors[name] for name in names[i::shards]}
        save_file(mine, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 1, "note": "kept"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def publish_compressed(source: Path, out: Path) -> Digests:
    """Everything `compress` does to files, with a made-up codec."""
    checkpoint = Checkpoint.open(source)
    parent = Parent.of(checkpoint, "org/base")
    calibration = Calibration(name="builtin", sha256="0" * 64, samples=2, tokens=64, device="cpu", dtype="float32")
    versions = {"kvcompress": "0"}
    with WorkDir.open(out, fingerprint({"version": 1}, 3, calibration, parent, versions)) as work:
        digests = copy_shards(checkpoint, work) | copy_side_files(checkpoint, work)
        digests |= write_file(work, "config.json", json.dumps(checkpoint.config | {"x": 1}).encode())
        digests |= write_file(work, "README.md", b"# Card\n")
        digests |= write_tensors(
            work,
            "kvcompress/codec.safetensors",
            {"layers.0.k.scale": torch.ones(2, 4), "layers.0.k.mean": torch.ones(3)},
        )
        manifest = Manifest(
            parent=parent,
            recipe={"version": 1},
            seed=3,
            calibration=calibration,
            versions=versions,
            bytes_per_token=BytesPerToken(base=2048, compressed=512, ratio=4.0),
            weights_bytes=Sizes(base=10, compressed=10),
            files=digests.files,
            headers=digests.headers,
            tensors=digests.tensors,
        )
        write_file(work, MANIFEST_FILE, manifest.to_bytes())
        work.publish()
    return digests


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> CheckpointMaker:
    """A function (name, tensors, shards) that writes a checkpoint under the test's own folder."""

    def make(name: str = "base", tensors: Mapping[str, torch.Tensor] | None = None, shards: int = 1) -> Path:
        return write_checkpoint(tmp_path / name, example_tensors() if tensors is None else tensors, shards)

    return make


@pytest.fixture
def compressed(make_checkpoint: CheckpointMaker, tmp_path: Path) -> Path:
    """A published compressed checkpoint with two shards."""
    publish_compressed(make_checkpoint(shards=2), tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def publish() -> Callable[[Path, Path], Digests]:
    """A function (source, out) that compresses with a made-up codec and publishes."""
    return publish_compressed


@pytest.fixture
def child_environment() -> dict[str, str]:
    """Environment in which a child process imports the same kvcompress."""
    root = str(Path(kvcompress.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
