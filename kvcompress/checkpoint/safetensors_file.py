"""One safetensors file: its header, checked as hostile input, and single tensors read with plain file reads.

Format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON header
`{"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}`, then the data, without holes.

Tensors are read with `readinto`, not mapped: mapped pages count as resident memory, and peak memory is a promise here.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvcompress.checkpoint import json_file
from kvcompress.checkpoint.atomic import atomic_file
from kvcompress.checkpoint.hashing import CHUNK_BYTES
from kvcompress.checkpoint.paths import quote

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000  # the official library's limit
LENGTH_BYTES = 8
ALIGNMENT = 8
METADATA_KEY = "__metadata__"
DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8,
    "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
TORCH_DTYPES = {
    "F64": "float64", "I64": "int64", "U64": "uint64", "C64": "complex64", "F32": "float32", "I32": "int32",
    "U32": "uint32", "F16": "float16", "BF16": "bfloat16", "I16": "int16", "U16": "uint16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class TensorSpec(NamedTuple):
    """A tensor to be written: `dtype` is a safetensors name such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor's bytes are: `offset` counts from the start of `file`, a path relative to its checkpoint."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A parsed header. `tensors` is in the order of the data; `nbytes` and `sha256` cover length field and JSON."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    nbytes: int
    sha256: str

    @property
    def file_bytes(self) -> int:
        """The size the whole file must have."""
        return self.nbytes + sum(info.nbytes for info in self.tensors.values())


def read_header_bytes(path: Path) -> bytes:
    """The length field and JSON of a header, unparsed.

    Raises:
        ValueError: the file is too short, or the length field is impossible.
    """
    file_bytes = path.stat().st_size
    with open(path, "rb", buffering=0) as file:
        prefix = _read_up_to(file, LENGTH_BYTES)
        if len(prefix) < LENGTH_BYTES:
            raise ValueError(
                f"{path} is truncated: found {file_bytes} bytes, a safetensors file has at least {LENGTH_BYTES}; "
                "download it again"
            )
        length = int.from_bytes(prefix, "little")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise ValueError(
                f"{path} is not a safetensors file: its header length reads {length} bytes, "
                f"expected 2 to {MAX_HEADER_BYTES}"
            )
        if LENGTH_BYTES + length > file_bytes:
            raise ValueError(
                f"{path} is truncated: found {file_bytes} bytes, its header alone takes {LENGTH_BYTES + length}; "
                "download it again"
            )
        return prefix + _read_up_to(file, length)


def parse_header(raw: bytes, where: str, file: str) -> Header:
    """Parse what `read_header_bytes` returned. `where` names the file in messages, `file` goes into each TensorInfo.

    Raises:
        ValueError: anything the format does not allow: broken JSON, unknown dtype, shape and byte count that disagree,
            overlapping tensors, unused bytes between them.
    """
    if raw[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
        raise ValueError(f"{where} is not a safetensors file: its header is not a JSON object")
    entries = json_file.parse_object(raw[LENGTH_BYTES:], f"the header of {where}")
    metadata = entries.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"the header of {where} is damaged: {METADATA_KEY} must map strings to strings")
    found = sorted((_entry(name, entry, where) for name, entry in entries.items()), key=lambda item: item[1:])
    tensors: dict[str, TensorInfo] = {}
    position = 0
    for spec, begin, end in found:
        if begin != position:
            problem = "overlaps the tensor before it" if begin < position else "leaves unused bytes before it"
            raise ValueError(f"the header of {where} is damaged: tensor {quote(spec.name)} {problem}")
        tensors[spec.name] = TensorInfo(spec.name, file, spec.dtype, spec.shape, len(raw) + begin, end - begin)
        position = end
    return Header(tensors, metadata, len(raw), hashlib.sha256(raw).hexdigest())


def read_header(path: Path, file: str | None = None) -> Header:
    """Read and check the header of a safetensors file, and that the file is as long as it says.

    Args:
        path: the file.
        file: its name in each `TensorInfo`; the plain file name if not given.

    Raises:
        ValueError: see `read_header_bytes` and `parse_header`; also a truncated or overlong file.
    """
    header = parse_header(read_header_bytes(path), str(path), file or path.name)
    found = path.stat().st_size
    if found != header.file_bytes:
        kind = "truncated" if found < header.file_bytes else "damaged"
        raise ValueError(
            f"{path} is {kind}: found {found} bytes, its header describes {header.file_bytes}; download it again"
        )
    return header


def read_tensor(path: Path, info: TensorInfo) -> torch.Tensor:
    """Read one tensor into fresh memory, on the CPU.

    Raises:
        ValueError: a dtype torch has no type for, or the file ends too early.
    """
    import torch

    dtype = torch_dtype(path, info)
    data = torch.empty(info.nbytes, dtype=torch.uint8)
    with open(path, "rb", buffering=0) as file:
        file.seek(info.offset)
        read_exactly(file, data.numpy().data, path, info)
    return data.view(dtype).reshape(info.shape)


def read_exactly(file: io.FileIO, view: memoryview, path: Path, info: TensorInfo) -> None:
    """Fill `view` from an unbuffered file. Raises ValueError if the file, whole when it was opened, ends early."""
    while view.nbytes:
        count = file.readinto(view)
        if not count:
            raise ValueError(f"{path} ended while tensor {quote(info.name)} was read; did another program write it?")
        view = view[count:]


def torch_dtype(path: Path, info: TensorInfo) -> torch.dtype:
    """The torch dtype of a tensor. Raises ValueError where torch has none."""
    import torch

    dtype = getattr(torch, TORCH_DTYPES.get(info.dtype, ""), None)
    if dtype is None:
        raise ValueError(f"tensor {quote(info.name)} of {path} has dtype {info.dtype}, which torch cannot hold")
    assert isinstance(dtype, torch.dtype)
    return dtype


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file, in the order of its data. Raises ValueError as `read_header` and `read_tensor` do."""
    return {name: read_tensor(path, info) for name, info in read_header(path).tensors.items()}


def build_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str], file: str) -> tuple[bytes, Header]:
    """The header bytes for these tensors, and where each one goes.

    The same tensors and metadata give the same bytes whatever their order: larger dtypes come first, which keeps
    every tensor aligned to its element size, then names in order; the header is padded so that data starts at a
    multiple of 8 bytes.
    """
    ordered = sorted(specs, key=lambda spec: (-DTYPE_BITS[spec.dtype], spec.name))
    entries: dict[str, Any] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for spec in ordered:
        assert spec.name != METADATA_KEY, "a tensor cannot have the name of the metadata"
        assert spec.name not in entries, f"{spec.name} is given twice"
        nbytes = _num_bytes(spec.dtype, spec.shape)
        assert nbytes is not None, f"{spec} does not take whole bytes"
        end = position + nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json_file.compact(entries)
    text += b" " * (-len(text) % ALIGNMENT)
    raw = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return raw, parse_header(raw, file, file)


@dataclass(frozen=True)
class SavedFile:
    """What `save_tensors` wrote: sha256 of the file, of its header, and of every tensor's bytes."""

    sha256: str
    header_sha256: str
    tensors: dict[str, str]


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> SavedFile:
    """Write a safetensors file whole or not at all; the same tensors give the same bytes."""
    specs = [tensor_spec(name, tensor) for name, tensor in tensors.items()]
    raw, header = build_header(specs, metadata or {}, path.name)
    whole = hashlib.sha256(raw)
    digests: dict[str, str] = {}
    with atomic_file(path) as file:
        file.write(raw)
        for name in header.tensors:
            data = tensor_bytes(tensors[name])
            digest = hashlib.sha256()
            for start in range(0, data.nbytes, CHUNK_BYTES):
                chunk = data[start : start + CHUNK_BYTES]
                file.write(chunk)
                digest.update(chunk)
                whole.update(chunk)
            digests[name] = digest.hexdigest()
    return SavedFile(whole.hexdigest(), header.sha256, digests)


def tensor_spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    """Name, safetensors dtype and shape of a tensor in memory."""
    return TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype, for instance "BF16"."""
    torch_name = str(dtype).removeprefix("torch.")
    names = [name for name, candidate in TORCH_DTYPES.items() if candidate == torch_name]
    assert names, f"safetensors has no type for {dtype}"
    return names[0]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements as bytes, row-major; a copy only where it is not contiguous on the CPU already."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _entry(name: str, entry: Any, where: str) -> tuple[TensorSpec, int, int]:
    """One header entry, checked on its own: (spec, begin, end)."""
    damaged = f"the header of {where} is damaged: tensor {quote(name)}"
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{damaged} has a name that is not Unicode text") from error
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{damaged} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{damaged} has the unknown dtype {quote(str(dtype))}")
    if not _is_sizes(shape):
        raise ValueError(f"{damaged} has a shape that is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{damaged} has data_offsets that are not [begin, end]")
    begin, end = offsets
    expected = _num_bytes(dtype, shape, limit=end - begin)
    if expected != end - begin:
        raise ValueError(f"{damaged} takes {end - begin} bytes, but its dtype {dtype} and shape need another number")
    return TensorSpec(name, dtype, tuple(shape)), begin, end


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _num_bytes(dtype: str, shape: Iterable[int], limit: int | None = None) -> int | None:
    """Bytes of a tensor; None where they are not whole, or pass `limit` (so that hostile shapes stay cheap)."""
    bits = DTYPE_BITS[dtype]
    sizes = list(shape)
    if 0 in sizes:
        return 0
    for size in sizes:
        bits *= size
        if limit is not None and bits > limit * 8:
            return None
    return bits // 8 if bits % 8 == 0 else None


def _read_up_to(file: io.FileIO, nbytes: int) -> bytes:
    """`nbytes` bytes, or fewer at the end of the file."""
    parts = []
    while nbytes > 0 and (part := file.read(nbytes)):
        parts.append(part)
        nbytes -= len(part)
    return b"".join(parts)
