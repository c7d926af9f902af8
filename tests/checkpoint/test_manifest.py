"""What a manifest records, and how it notices changes to itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcompress.checkpoint.manifest import (
    MANIFEST_FILE,
    Calibration,
    Manifest,
    ManifestDamagedError,
    Parent,
    fingerprint,
    is_published,
    package_versions,
)
from kvcompress.checkpoint.reader import Checkpoint


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as its writer would: with a fresh self-digest."""
    path = folder / MANIFEST_FILE
    data = json.loads(path.read_text())
    change(data)
    rest = {key: value for key, value in data.items() if key != "sha256"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    data["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def test_round_trip(compressed: Path) -> None:
    manifest = Manifest.load(compressed)
    assert manifest.to_bytes() == (compressed / MANIFEST_FILE).read_bytes()
    assert manifest.bytes_per_token.model_dump() == {"base": 2048, "compressed": 512, "ratio": 4.0}
    assert manifest.format_version == 1
    assert manifest.parent.source == "org/base"


def test_it_covers_every_file(compressed: Path) -> None:
    manifest = Manifest.load(compressed)
    files = {str(path.relative_to(compressed)) for path in compressed.rglob("*") if path.is_file()}
    assert files == manifest.files.keys() | manifest.headers.keys() | {MANIFEST_FILE}


def test_parent_hashes_are_those_of_the_files(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(shards=2)
    parent = Parent.of(Checkpoint.open(folder), "org/base")
    names = {"config.json", "model.safetensors.index.json", *(path.name for path in folder.glob("*.safetensors"))}
    assert parent.files == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no kvcompress/manifest\.json; expected a checkpoint compressed by"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": NaN}', "[" * 10**5, '{"a": ' * 600 + "1" + "}" * 600])
def test_not_json(compressed: Path, text: str) -> None:
    (compressed / MANIFEST_FILE).write_text(text)
    with pytest.raises(ManifestDamagedError, match=r"manifest\.json was changed after it was written") as caught:
        Manifest.load(compressed)
    assert "\n" not in str(caught.value)


def test_a_changed_field_is_noticed(compressed: Path) -> None:
    path = compressed / MANIFEST_FILE
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))
    with pytest.raises(ManifestDamagedError, match="expected sha256 "):
        Manifest.load(compressed)


def test_changed_white_space_is_noticed(compressed: Path) -> None:
    path = compressed / MANIFEST_FILE
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ManifestDamagedError, match="layout"):
        Manifest.load(compressed)


def test_newer_format_is_refused(compressed: Path) -> None:
    rewrite(compressed, lambda data: data.update(format_version=2, something_new=True))
    with pytest.raises(
        ValueError, match=r"has format version 2, this kvcompress .* reads 1; update kvcompress"
    ) as caught:
        Manifest.load(compressed)
    assert not isinstance(caught.value, ManifestDamagedError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(extra=1), "extra"),
        (lambda data: data.pop("recipe"), "recipe"),
        (lambda data: data["files"].update({"../x": "0"}), "not a path inside the checkpoint folder"),
        (lambda data: data["tensors"].update({"/x.safetensors::a": "0"}), "not a path inside the checkpoint folder"),
    ],
)
def test_wrong_fields_are_refused(compressed: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    rewrite(compressed, change)
    with pytest.raises(ValueError, match=message) as caught:
        Manifest.load(compressed)
    assert "\n" not in str(caught.value)


def test_a_finished_output_is_recognised_by_its_inputs(compressed: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(compressed)
    inputs = manifest.fingerprint()
    assert is_published(compressed, inputs)
    assert not is_published(compressed, inputs | {"seed": 4})
    assert not is_published(tmp_path / "nothing", inputs)
    calibration = Calibration(name="builtin", sha256="0" * 64, samples=2, tokens=64, device="cpu", dtype="float32")
    assert fingerprint({"version": 1}, 3, calibration, manifest.parent, {"kvcompress": "0"}) == inputs


def test_versions_name_what_is_installed() -> None:
    import torch

    versions = package_versions(["torch", "no-such-package"])
    assert versions["torch"] == torch.__version__
    assert versions.keys() == {"python", "kvcompress", "torch"}
