"""Every changed bit is found, and named."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvcompress.checkpoint.manifest import MANIFEST_FILE, Manifest, ManifestDamagedError
from kvcompress.checkpoint.safetensors_file import read_header
from kvcompress.checkpoint.verify import accept, require_verified, verify, verify_codec

CODEC = "kvcompress/codec.safetensors"
SHARD = "model-00001-of-00002.safetensors"


def named(folder: Path) -> list[str]:
    return [mismatch.tensor for mismatch in verify(folder).mismatches]


def test_an_untouched_folder_is_whole(compressed: Path) -> None:
    manifest, done = Manifest.load(compressed), []
    report = verify(compressed, done.append)
    assert report.ok
    assert report.to_json() == {"ok": True, "checked": report.checked, "mismatches": [], "documents": []}
    assert report.checked == 1 + len(manifest.files) + len(manifest.headers) + len(manifest.tensors)
    require_verified(report, compressed)
    headers = sum(read_header(compressed / file).nbytes for file in manifest.headers)
    sizes = [path.stat().st_size for path in compressed.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert sum(done) == sum(sizes) - headers


def expected_name(folder: Path, file: str, offset: int) -> str:
    """What verify must name for a change at this byte, worked out from the undamaged file."""
    if not file.endswith(".safetensors"):
        return file
    for info in read_header(folder / file).tensors.values():
        if info.offset <= offset < info.offset + info.nbytes:
            return f"{file}::{info.name}"
    return file


def test_a_flipped_bit_anywhere_is_found_and_named(compressed: Path) -> None:
    chance = random.Random(7)
    files = sorted(str(path.relative_to(compressed)) for path in compressed.rglob("*") if path.is_file())
    assert len(files) == 10
    for file in files:
        path = compressed / file
        raw = path.read_bytes()
        for _ in range(10):
            offset, bit = chance.randrange(len(raw)), chance.randrange(8)
            expected = expected_name(compressed, file, offset)
            changed = bytearray(raw)
            changed[offset] ^= 1 << bit
            path.write_bytes(changed)
            report = verify(compressed)
            path.write_bytes(raw)
            if file in ("README.md", "LICENSE"):
                assert report.ok
                assert [document.tensor for document in report.documents] == [file]
                continue
            assert [mismatch.tensor for mismatch in report.mismatches] == [expected], (file, offset, bit)
            with pytest.raises(ValueError, match=r"is damaged: .*; get a new copy") as caught:
                require_verified(report, compressed)
            assert expected in str(caught.value)
            assert "\n" not in str(caught.value)
    assert verify(compressed).ok


def test_no_part_of_the_manifest_can_change(compressed: Path) -> None:
    """A bit of every third byte: the parser must not swallow any of them."""
    path = compressed / MANIFEST_FILE
    raw = path.read_bytes()
    for offset in range(0, len(raw), 3):
        changed = bytearray(raw)
        changed[offset] ^= 1 << offset % 8
        path.write_bytes(changed)
        with pytest.raises(ManifestDamagedError):
            Manifest.load(compressed)
    (mismatch,) = verify(compressed).mismatches
    assert mismatch.tensor == MANIFEST_FILE


def test_every_byte_of_a_header_counts(compressed: Path) -> None:
    path = compressed / CODEC
    raw = path.read_bytes()
    for offset in range(read_header(path).nbytes):
        changed = bytearray(raw)
        changed[offset] ^= 1 << offset % 8
        path.write_bytes(changed)
        assert [mismatch.tensor for mismatch in verify_codec(compressed).mismatches] == [CODEC], offset


def test_mismatches_say_expected_and_found(compressed: Path) -> None:
    manifest = Manifest.load(compressed)
    (compressed / "tokenizer.json").write_text("{}")
    (mismatch,) = verify(compressed).to_json()["mismatches"]
    assert mismatch["tensor"] == "tokenizer.json"
    assert mismatch["expected"] == manifest.files["tokenizer.json"]
    assert mismatch["found"] == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", SHARD, CODEC])
def test_missing_files_are_named(compressed: Path, file: str) -> None:
    (compressed / file).unlink()
    assert named(compressed) == [file]
    assert verify(compressed).mismatches[0].found == "missing"


def test_a_truncated_shard_names_the_tensors_it_lacks(compressed: Path) -> None:
    last = list(read_header(compressed / SHARD).tensors)[-1]
    path = compressed / SHARD
    path.write_bytes(path.read_bytes()[:-1])
    assert named(compressed) == [f"{SHARD}::{last}"]
    path.write_bytes(path.read_bytes()[:20])
    assert named(compressed) == [SHARD]


def test_bytes_after_the_end_are_found(compressed: Path) -> None:
    with (compressed / SHARD).open("ab") as file:
        file.write(b"\0")
    assert named(compressed) == [SHARD]


@pytest.mark.parametrize(
    "name",
    [
        "extra.safetensors",
        "kvcompress/extra.safetensors",
        "pytorch_model.bin",
        "model.py",
        "chat_template.json",
        "additional_chat_templates/tool_use.jinja",
        "generation_config.json",
        "adapter_config.json",
    ],
)
def test_unlisted_files_that_a_loader_would_use_are_found(compressed: Path, name: str) -> None:
    (compressed / name).parent.mkdir(exist_ok=True)
    save_file({"a": torch.ones(1)}, compressed / name)
    assert named(compressed) == [name]


def test_other_unlisted_files_are_not_our_business(compressed: Path) -> None:
    (compressed / ".gitattributes").touch()
    (compressed / "notes.txt").touch()
    (compressed / "results.json").touch()
    (compressed / "LICENSE").touch()
    report = verify(compressed)
    assert report.ok
    assert not report.documents


@pytest.mark.parametrize("change", [lambda path: path.write_text("a better card"), Path.unlink])
def test_a_card_is_not_the_model(compressed: Path, change: Callable[[Path], object]) -> None:
    change(compressed / "README.md")
    report = verify(compressed)
    require_verified(report, compressed)
    assert [document.tensor for document in report.documents] == ["README.md"]


def test_an_edit_can_be_accepted_and_the_manifest_says_so(compressed: Path) -> None:
    before = Manifest.load(compressed)
    (compressed / "tokenizer.json").write_text("{}")
    (compressed / "generation_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"--accept generation_config\.json --accept tokenizer\.json`"):
        require_verified(verify(compressed), compressed)
    names = ["tokenizer.json", "generation_config.json"]
    assert accept(compressed, names) == names
    assert verify(compressed).ok
    assert accept(compressed, ["tokenizer.json"]) == []
    after = Manifest.load(compressed)
    assert [(one.file, one.before, one.after) for one in after.accepted] == [
        ("tokenizer.json", before.files["tokenizer.json"], after.files["tokenizer.json"]),
        ("generation_config.json", None, after.files["generation_config.json"]),
    ]
    assert (after.tensors, after.headers, after.recipe) == (before.tensors, before.headers, before.recipe)
    (compressed / "tokenizer.json").write_text("[]")
    assert named(compressed) == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.json", "part of the compressed model"),
        (SHARD, "part of the compressed model"),
        (CODEC, "part of the compressed model"),
        (MANIFEST_FILE, "part of the compressed model"),
        ("model.safetensors.index.json", "part of the compressed model"),
        ("modeling.py", "part of the compressed model"),
        ("../tokenizer.json", "not a path inside"),
        ("generation_config.json", "is missing"),
    ],
)
def test_what_is_the_model_cannot_be_accepted(compressed: Path, name: str, words: str) -> None:
    (compressed / "tokenizer.json").write_text("{}")
    raw = (compressed / MANIFEST_FILE).read_bytes()
    with pytest.raises(ValueError, match=words):
        accept(compressed, ["tokenizer.json", name])
    assert (compressed / MANIFEST_FILE).read_bytes() == raw


def test_no_manifest_is_an_error_not_a_mismatch(compressed: Path) -> None:
    (compressed / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match="has no kvcompress/manifest"):
        verify(compressed)


def test_codec_only(compressed: Path) -> None:
    (compressed / "tokenizer.json").write_text("{}")
    (compressed / SHARD).unlink()
    report = verify_codec(compressed)
    assert report.ok
    assert report.checked == 1 + 1 + 1 + 2  # manifest, config.json, codec header, codec tensors
    assert not verify_codec(compressed, verify_weights=True).ok
    for file in ("config.json", CODEC):
        raw = (compressed / file).read_bytes()
        (compressed / file).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        assert [m.tensor.split("::")[0] for m in verify_codec(compressed).mismatches] == [file]
        (compressed / file).write_bytes(raw)


def test_a_copy_elsewhere_is_still_whole(compressed: Path, tmp_path: Path) -> None:
    shutil.copytree(compressed, tmp_path / "copy")
    assert verify(tmp_path / "copy").ok


def test_same_inputs_give_the_same_bytes(
    compressed: Path, tmp_path: Path, publish: Callable[[Path, Path], object]
) -> None:
    publish(tmp_path / "base", tmp_path / "again")
    left, right = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (compressed, tmp_path / "again")
    )
    assert left == right
