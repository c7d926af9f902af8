"""Our header parser and writer against the official library, and against damaged files."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from kvcompress.checkpoint.safetensors_file import (
    TORCH_DTYPES,
    Header,
    TensorSpec,
    build_header,
    dtype_name,
    load_tensors,
    read_header,
    save_tensors,
)

DTYPES = sorted({getattr(torch, name) for name in TORCH_DTYPES.values()}, key=str)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


@st.composite
def tensor_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(st.lists(st.text(min_size=1, max_size=12).filter(lambda n: n != "__metadata__"), unique=True))
    tensors = {}
    for name in names:
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        count = int(torch.Size(shape).numel()) * dtype.itemsize
        raw = draw(st.binary(min_size=count, max_size=count))
        if dtype == torch.bool:
            raw = bytes(byte & 1 for byte in raw)
        data = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        tensors[name] = data.view(dtype).reshape(shape)
    return tensors


@settings(max_examples=60, deadline=None)
@given(tensor_dicts())
def test_reads_what_the_official_library_writes(tensors: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        found = load_tensors(path)
        assert read_header(path).metadata == {"format": "pt"}
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensors[name]) for name in tensors)


@settings(max_examples=60, deadline=None)
@given(tensor_dicts())
def test_official_library_reads_what_we_write(tensors: dict[str, torch.Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_tensors(path, tensors, {"made": "here"})
        found = load_file(path)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"made": "here"}
        for info in read_header(path).tensors.values():
            assert info.offset % found[info.name].element_size() == 0
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensors[name]) for name in tensors)


def test_same_tensors_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3, dtype=torch.int8), "a": torch.ones(2), "c": torch.ones(1, 1, dtype=torch.float64)}
    first = save_tensors(tmp_path / "1", tensors, {"x": "1", "y": "2"})
    second = save_tensors(tmp_path / "2", dict(reversed(tensors.items())), {"y": "2", "x": "1"})
    assert first == second
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert list(read_header(tmp_path / "1").tensors) == ["c", "a", "b"]


def test_saved_digests_are_those_of_the_file(tmp_path: Path) -> None:
    import hashlib

    saved = save_tensors(tmp_path / "t", {"a": torch.arange(6).reshape(2, 3).T, "b": torch.tensor(2.5)})
    raw, header = (tmp_path / "t").read_bytes(), read_header(tmp_path / "t")
    assert saved.sha256 == hashlib.sha256(raw).hexdigest()
    assert saved.header_sha256 == header.sha256 == hashlib.sha256(raw[: header.nbytes]).hexdigest()
    for name, info in header.tensors.items():
        assert saved.tensors[name] == hashlib.sha256(raw[info.offset : info.offset + info.nbytes]).hexdigest()


def test_build_header_refuses_a_name_twice() -> None:
    with pytest.raises(AssertionError):
        build_header([TensorSpec("a", "F32", (1,)), TensorSpec("a", "F32", (1,))], {}, "file")


def test_dtype_names_are_those_of_the_official_library(tmp_path: Path) -> None:
    for dtype in DTYPES:
        save_file({"a": torch.zeros(2, dtype=dtype)}, tmp_path / "t")
        assert dtype_name(dtype) == read_header(tmp_path / "t").tensors["a"].dtype


def official_accepts(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return bool(file.keys()) or True
    except (SafetensorError, OSError, ValueError):
        return False


def parse(raw: bytes) -> Header | None:
    """Our verdict on a file's bytes; anything but a one-line ValueError, or trust the official library lacks, fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(raw)
        try:
            header = read_header(path)
        except ValueError as error:
            message = str(error)
        else:
            assert official_accepts(path)
            return header
    assert "\n" not in message
    assert len(message) < 600
    return None


def example_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_file({"layer.a": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.int8)}, path, metadata={"format": "pt"})
        return path.read_bytes()


EXAMPLE = example_bytes()
HEADER_BYTES = 8 + int.from_bytes(EXAMPLE[:8], "little")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, HEADER_BYTES * 8 - 1), min_size=1, max_size=3))
def test_flipped_header_bits_never_crash(bits: list[int]) -> None:
    raw = bytearray(EXAMPLE)
    for bit in bits:
        raw[bit // 8] ^= 1 << bit % 8
    parse(bytes(raw))


@pytest.mark.parametrize("size", range(len(EXAMPLE)))
def test_every_truncation_is_refused(size: int) -> None:
    assert parse(EXAMPLE[:size]) is None


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: str = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "header is not a JSON object"),
        (b"{" * 9, "not valid JSON"),
        (b"\xff\xfe{}", "header is not a JSON object"),
        (b'{"a":"\xff"}', "not valid JSON"),
        (b'{"a":1,"a":2}', "given twice"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
        (json.dumps({"a": 3}).encode(), "needs exactly dtype, shape and data_offsets"),
        (json.dumps({"a": entry() | {"more": 1}}).encode(), "needs exactly dtype, shape and data_offsets"),
        (json.dumps({"a": entry("Q8")}).encode(), "unknown dtype 'Q8'"),
        (json.dumps({"a": entry(shape=[-1, -4])}).encode(), "shape that is not a list of sizes"),
        (json.dumps({"a": entry(shape=[True, 4])}).encode(), "shape that is not a list of sizes"),
        (json.dumps({"a": entry(shape=[4.0])}).encode(), "shape that is not a list of sizes"),
        (json.dumps({"a": entry(offsets=[4, 0])}).encode(), "data_offsets that are not"),
        (json.dumps({"a": entry(offsets=[0])}).encode(), "data_offsets that are not"),
        (json.dumps({"a": entry("F32")}).encode(), "dtype F32 and shape need another number"),
        (json.dumps({"a": entry("F4", [3], [0, 1])}).encode(), "dtype F4 and shape need another number"),
        (json.dumps({"a": entry(shape=[2**62] * 50_000)}).encode(), "need another number"),
        (json.dumps({"a": entry(offsets=[2, 6])}).encode(), "leaves unused bytes before it"),
        (json.dumps({"a": entry(), "b": entry(offsets=[2, 6])}).encode(), "overlaps the tensor before it"),
        (json.dumps({"__metadata__": {"a": 1}}).encode(), "must map strings to strings"),
        (json.dumps({"\ud800": entry()}).encode(), "not Unicode text"),
        (json.dumps({"a": entry(shape=[8], offsets=[0, 8])}).encode(), "is truncated: found"),
        (json.dumps({"a": entry(shape=[2], offsets=[0, 2])}).encode(), "is damaged: found"),
    ],
)
def test_hostile_headers_are_refused(header: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(with_header(header, b"1234"))
    with pytest.raises(ValueError, match=message) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 2**64 - 1])
def test_impossible_header_lengths_are_refused(length: int, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(length.to_bytes(8, "little") + b"{}" * 20)
    with pytest.raises(ValueError, match=f"header length reads {length} bytes"):
        read_header(tmp_path / "t")


def test_truncation_names_found_and_expected_bytes(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(EXAMPLE[:-3])
    with pytest.raises(ValueError, match=f"t is truncated: found {len(EXAMPLE) - 3} bytes, .* {len(EXAMPLE)};"):
        read_header(tmp_path / "t")


def test_a_file_cut_after_opening_is_refused(tmp_path: Path) -> None:
    from kvcompress.checkpoint.safetensors_file import read_tensor

    path = tmp_path / "t"
    path.write_bytes(EXAMPLE)
    info = read_header(path).tensors["b"]
    path.write_bytes(EXAMPLE[:-1])
    with pytest.raises(ValueError, match="ended while tensor 'b' was read"):
        read_tensor(path, info)


def test_dtypes_torch_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(with_header(json.dumps({"a": entry("F4", [8])}).encode(), b"1234"))
    with pytest.raises(ValueError, match=r"'a' of .* has dtype F4, which torch cannot hold"):
        load_tensors(path)
