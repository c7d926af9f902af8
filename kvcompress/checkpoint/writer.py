"""Write a checkpoint's files into a `WorkDir`: shards tensor by tensor, side files, new tensors. All of it resumes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from kvcompress.checkpoint import json_file
from kvcompress.checkpoint.atomic import atomic_file, atomic_write
from kvcompress.checkpoint.digests import Digests, split_key, tensor_key
from kvcompress.checkpoint.hashing import read_chunks, sha256_file
from kvcompress.checkpoint.paths import quote
from kvcompress.checkpoint.reader import CONFIG_FILE, INDEX_FILE, PICKLE_SUFFIXES, Checkpoint
from kvcompress.checkpoint.safetensors_file import (
    Header,
    TensorInfo,
    TensorSpec,
    build_header,
    read_header,
    save_tensors,
    tensor_bytes,
    tensor_spec,
)
from kvcompress.checkpoint.workdir import WorkDir

if TYPE_CHECKING:
    import torch

CARD_FILE = "README.md"
OTHER_WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".tflite")
WEIGHT_SUFFIXES = (*PICKLE_SUFFIXES, *OTHER_WEIGHT_SUFFIXES)
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_SUFFIX = ".jinja"
OWNED_FOLDERS = ("template", "tokenizer", "vocab")
"""Words in the names of sub-folders whose files a tokenizer reads, such as `additional_chat_templates`."""
OTHER_FOLDERS = ("kvcompress", "original", "onnx")
"""Our own, and those with other copies of the weights."""

Progress = Callable[[int], None]
"""Called with the number of bytes finished since the last call."""


class Transform(Protocol):
    """What a weight method does to single tensors while shards are copied."""

    def plan(self, info: TensorInfo) -> Sequence[TensorSpec] | None:
        """The tensors that replace this one, in its shard; None to copy it as it is. Decided before data is read."""
        ...

    def apply(self, name: str, tensor: torch.Tensor) -> Iterable[tuple[str, torch.Tensor]]:
        """Make the planned tensors."""
        ...


def copy_shards(
    checkpoint: Checkpoint, work: WorkDir, transform: Transform | None = None, progress: Progress | None = None
) -> Digests:
    """Write every weight file of `checkpoint` under its own name, and the index if there was one.

    Memory: one tensor and what replaces it where the transform applies, 4 MiB where it does not. A shard in which
    nothing is replaced keeps its exact bytes.

    Args:
        checkpoint: where tensors come from.
        work: where shards go; each is one unit, so a resumed run writes the missing ones only.
        transform: replaces single tensors.
        progress: told about input bytes as they are done.

    Raises:
        ValueError: a shard changed since the checkpoint was opened.
    """
    digests = Digests()
    for shard, header in checkpoint.headers.items():
        unit = f"shard:{shard}"
        if work.done(unit):
            if progress:
                progress(header.file_bytes)
        else:
            plan = {info.name: transform.plan(info) for info in header.tensors.values()} if transform else {}
            if transform and any(specs is not None for specs in plan.values()):
                written, sha256 = _transform_shard(checkpoint, shard, work.path(shard), transform, plan, progress)
            else:
                written, sha256 = _copy_shard(checkpoint, shard, work.path(shard), progress)
            work.commit(unit, {shard: sha256}, written.to_json())
        digests |= Digests.from_json(work.data(unit))
    if checkpoint.index is not None:
        digests |= write_file(work, INDEX_FILE, _index(checkpoint, work, digests))
    return digests


def copy_side_files(checkpoint: Checkpoint, work: WorkDir) -> Digests:
    """Copy the tokenizer, generation config, chat templates, licence and the like (`side_files`), byte for byte."""
    digests = Digests()
    for name in side_files(checkpoint.path):
        source = checkpoint.file(name)
        digests |= write_file(work, name, partial(_copy_file, source))
    return digests


def check_side_files(checkpoint: Checkpoint) -> None:
    """Look, before any work, at everything that `copy_side_files` will copy at its end.

    Raises:
        ValueError: a name that no manifest can hold, a link that leads out of the folder, a file that cannot be read.
    """
    for name in side_files(checkpoint.path):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{checkpoint.path} has a file whose name is not Unicode text, {quote(name)}; rename or remove it"
            ) from None
        if not os.access(checkpoint.file(name), os.R_OK):
            raise ValueError(f"{checkpoint.path / name} cannot be read; allow it, or remove the file")


def side_files(folder: Path) -> list[str]:
    """What a checkpoint has besides config and weights, as paths relative to its folder, sorted.

    That is every visible file directly in the folder but config.json, README.md and weights of any format, which are
    written anew or left behind; and of sub-folders what a tokenizer owns: folders of templates, of vocabularies or of
    a tokenizer, templates wherever they are, and files that tokenizer_config.json names. A sub-folder that holds a
    model is another model, and stays behind whole.
    """
    named = _strings(folder / TOKENIZER_CONFIG_FILE)
    found = []
    for entry in folder.iterdir():
        if entry.is_file() and is_side_file(entry.name):
            found.append(entry.name)
        elif entry.is_dir() and not entry.name.startswith(".") and entry.name not in OTHER_FOLDERS:
            inner = [path for path in entry.rglob("*") if path.is_file()]
            if any(path.name == CONFIG_FILE or path.name.endswith(WEIGHT_SUFFIXES) for path in inner):
                continue
            owned = any(word in entry.name.lower() for word in OWNED_FOLDERS)
            for path in inner:
                relative = path.relative_to(folder)
                visible = not any(part.startswith(".") for part in relative.parts)
                mine = owned or path.suffix == TEMPLATE_SUFFIX or relative.as_posix() in named
                if visible and mine and is_side_file(path.name):
                    found.append(relative.as_posix())
    return sorted(found)


def is_side_file(name: str) -> bool:
    """Whether a file of this name is a side file."""
    skipped = name in (CONFIG_FILE, CARD_FILE) or name.startswith(".")
    return not skipped and not name.endswith(WEIGHT_SUFFIXES)


def write_file(work: WorkDir, relative: str, data: bytes | Callable[[BinaryIO], None]) -> Digests:
    """Write one file of the output as a unit of its own; a resumed run does not write it again."""
    unit = f"file:{relative}"
    if not work.done(unit):
        work.commit(unit, {relative: atomic_write(work.path(relative), data)})
    return Digests(files=work.files(unit))


def write_tensors(
    work: WorkDir, relative: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Digests:
    """Write a new safetensors file of the output (for instance `kvcompress/codec.safetensors`) as one unit."""
    saved = save_tensors(work.path(relative), tensors, metadata)
    digests = Digests(
        {tensor_key(relative, name): sha256 for name, sha256 in saved.tensors.items()}, {relative: saved.header_sha256}
    )
    work.commit(f"tensors:{relative}", {relative: saved.sha256}, digests.to_json())
    return digests


def _copy_shard(checkpoint: Checkpoint, shard: str, target: Path, progress: Progress | None) -> tuple[Digests, str]:
    """Copy a shard byte for byte. Returns its digests, and the sha256 of the file."""
    header = checkpoint.headers[shard]
    tensors: dict[str, str] = {}
    whole = hashlib.sha256()
    with open(checkpoint.file(shard), "rb", buffering=0) as source, atomic_file(target) as output:

        def copy(nbytes: int) -> str:
            digest, copied = hashlib.sha256(), 0
            for chunk in read_chunks(source, nbytes):
                output.write(chunk)
                digest.update(chunk)
                whole.update(chunk)
                copied += len(chunk)
                if progress:
                    progress(len(chunk))
            if copied != nbytes:
                raise ValueError(f"{checkpoint.path / shard} became shorter while it was read; do not write to it")
            return digest.hexdigest()

        header_sha256 = copy(header.nbytes)
        if header_sha256 != header.sha256:
            raise ValueError(f"{checkpoint.path / shard} changed while it was read; do not write to it")
        for info in header.tensors.values():
            tensors[tensor_key(shard, info.name)] = copy(info.nbytes)
    return Digests(tensors, {shard: header_sha256}), whole.hexdigest()


def _transform_shard(
    checkpoint: Checkpoint,
    shard: str,
    target: Path,
    transform: Transform,
    plan: Mapping[str, Sequence[TensorSpec] | None],
    progress: Progress | None,
) -> tuple[Digests, str]:
    """Write a shard some of whose tensors are replaced. Inputs are read in file order, outputs go where they belong."""
    source = checkpoint.headers[shard]
    specs: list[TensorSpec] = []
    for info in source.tensors.values():
        planned = plan[info.name]
        specs += [TensorSpec(info.name, info.dtype, info.shape)] if planned is None else planned
    raw, header = build_header(specs, source.metadata, shard)
    tensors: dict[str, str] = {}
    with atomic_file(target) as output:
        output.write(raw)
        for info in source.tensors.values():
            planned = plan[info.name]
            if planned is None:
                sha256 = _copy_tensor(checkpoint.file(shard), info, output, header.tensors[info.name])
                tensors[tensor_key(shard, info.name)] = sha256
            else:
                tensors |= _replace_tensor(checkpoint, info, transform, planned, output, header)
            if progress:
                progress(info.nbytes)
    in_file_order = {tensor_key(shard, name): tensors[tensor_key(shard, name)] for name in header.tensors}
    return Digests(in_file_order, {shard: header.sha256}), sha256_file(target)


def _replace_tensor(
    checkpoint: Checkpoint,
    info: TensorInfo,
    transform: Transform,
    planned: Sequence[TensorSpec],
    output: BinaryIO,
    header: Header,
) -> dict[str, str]:
    """Write what a transform makes of one tensor. Returns the sha256 of each part by key.

    A function of its own so that all its tensors are gone when the next one is read.
    """
    digests: dict[str, str] = {}
    expected = {spec.name: spec for spec in planned}
    for name, tensor in transform.apply(info.name, checkpoint.read(info.name)):
        assert tensor_spec(name, tensor) == expected.pop(name), f"{name} is not as planned"
        data = tensor_bytes(tensor)
        output.seek(header.tensors[name].offset)
        output.write(data)
        digests[tensor_key(info.file, name)] = hashlib.sha256(data).hexdigest()
    assert not expected, f"planned but not made: {sorted(expected)}"
    return digests


def _copy_tensor(path: Path, info: TensorInfo, output: BinaryIO, place: TensorInfo) -> str:
    """Copy the bytes of one tensor to its place in another file. Returns their sha256."""
    digest, copied = hashlib.sha256(), 0
    output.seek(place.offset)
    with open(path, "rb", buffering=0) as source:
        source.seek(info.offset)
        for chunk in read_chunks(source, info.nbytes):
            output.write(chunk)
            digest.update(chunk)
            copied += len(chunk)
    if copied != info.nbytes:
        raise ValueError(f"{path} became shorter while it was read; do not write to it")
    return digest.hexdigest()


def _index(checkpoint: Checkpoint, work: WorkDir, digests: Digests) -> bytes:
    """The index of what was written: the input's metadata, with the total size and the map of tensors made anew."""
    assert checkpoint.index is not None
    found = checkpoint.index.get("metadata")
    infos = [info for shard in checkpoint.shards for info in read_header(work.path(shard)).tensors.values()]
    metadata = {**(found if isinstance(found, dict) else {}), "total_size": sum(info.nbytes for info in infos)}
    weight_map = {name: file for file, name in map(split_key, digests.tensors)}
    return json_file.pretty({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def _strings(path: Path) -> set[str]:
    """Every string in a JSON file; none where it is missing or no JSON, which is for the tokenizer to say."""

    def within(value: Any) -> set[str]:
        if isinstance(value, str):
            return {value}
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return set().union(*map(within, inner))

    try:
        return within(json_file.read_object(path))
    except (OSError, ValueError):
        return set()


def _copy_file(source: Path, target: BinaryIO) -> None:
    with open(source, "rb", buffering=0) as file:
        target.writelines(read_chunks(file, source.stat().st_size))
