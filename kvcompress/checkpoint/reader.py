"""A Hugging Face checkpoint, opened from its config and headers alone; weights are read one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress.checkpoint import json_file
from kvcompress.checkpoint.paths import check_plain_name, inside, quote
from kvcompress.checkpoint.safetensors_file import Header, TensorInfo, read_header, read_tensor
from kvcompress.checkpoint.source import resolve
from kvcompress.families import family_of

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
QUANT_METHOD = "kvcompress"
CONFIG_VERSION = 2  # of the quantization_config section we write


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder: config, where every tensor is, and reads on demand.

    Attributes:
        path: the folder.
        config: config.json, parsed.
        headers: header of each weight file, by file name, in the order of the names.
        index: model.safetensors.index.json, parsed, or None for a single file.
    """

    path: Path
    config: dict[str, Any]
    headers: dict[str, Header]
    index: dict[str, Any] | None

    @classmethod
    def open(cls, model: str | Path) -> Checkpoint:
        """Open a folder or hub id. Reads config.json, the index and the headers; no weights.

        Raises:
            ValueError: no such model, no or invalid config.json, no safetensors weights, a damaged or truncated shard,
                an index that names files outside the folder or does not agree with the shards.
        """
        path = resolve(model)
        config_path = inside(path, CONFIG_FILE)
        if not config_path.is_file():
            raise ValueError(f"{path} has no {CONFIG_FILE}; expected the folder of a Hugging Face checkpoint")
        config = json_file.read_object(config_path)
        _refuse_adapter(path)
        index, shards = _shards(path)
        headers = {name: read_header(inside(path, name), name) for name in shards}
        _check_unique(path, headers)
        if index is not None:
            _check_index(path, index, headers, config)
        return cls(path, config, headers, index)

    @property
    def shards(self) -> list[str]:
        """Names of the weight files, in order."""
        return list(self.headers)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, in the order of shards and of the data in them."""
        return {name: info for header in self.headers.values() for name, info in header.tensors.items()}

    @property
    def largest_tensor_bytes(self) -> int:
        """Bytes of the largest tensor: what reading any one of them takes at most."""
        return max((info.nbytes for info in self.tensors.values()), default=0)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors together, headers not counted."""
        return sum(info.nbytes for info in self.tensors.values())

    def file(self, name: str) -> Path:
        """The real path of a file of this checkpoint. Raises ValueError if the name or a link leaves the folder."""
        return inside(self.path, name)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, on the CPU, in its stored dtype.

        Raises:
            ValueError: no tensor of that name, a dtype torch has no type for, or a file that was cut since.
        """
        info = self.tensors.get(name)
        if info is None:
            raise ValueError(f"{self.path} has no tensor {quote(name)}")
        return read_tensor(self.file(info.file), info)


def is_compressed(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a checkpoint kvcompress wrote."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == QUANT_METHOD


def refuse_compressed(checkpoint: Checkpoint) -> None:
    """Raises ValueError if the checkpoint was compressed before: damage would add up unmeasured."""
    if is_compressed(checkpoint.config):
        raise ValueError(
            f"{checkpoint.path} is already compressed by kvcompress; use the base model that its "
            "kvcompress/manifest.json records as parent, or run `kvcompress decompress` first"
        )


def _shards(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The parsed index, if there is one, and the names of the weight files."""
    index_path, single_path = inside(path, INDEX_FILE), inside(path, SINGLE_FILE)
    if not index_path.is_file():
        if single_path.is_file():
            return None, [SINGLE_FILE]
        raise ValueError(_why_no_weights(path))
    index = json_file.read_object(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index_path} has no weight_map; expected one that names the file of every tensor")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index_path} has a weight_map with something other than file names")
    shards = sorted(set(weight_map.values()))
    for name in shards:
        check_plain_name(name, str(index_path))
        if not name.endswith(".safetensors"):
            raise ValueError(f"{index_path} names the file {quote(name)}; expected *.safetensors files only")
        if not inside(path, name).is_file():
            raise ValueError(f"{index_path} names {quote(name)}, which is not in the folder; download it again")
    if SINGLE_FILE not in shards and single_path.is_file():
        raise ValueError(f"{path} has both {SINGLE_FILE} and {INDEX_FILE}; remove the one that is out of date")
    return index, shards


def _refuse_adapter(path: Path) -> None:
    adapter = path / ADAPTER_FILE
    if adapter.exists():
        raise ValueError(
            f"{path} has {ADAPTER_FILE}: transformers would put an adapter on these weights, which the result would "
            "lack; merge it first (merge_and_unload of peft), or remove the file if it belongs elsewhere"
        )


def _why_no_weights(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    if other := [name for name in names if name.endswith(".safetensors")]:
        return f"{path} has {quote(other[0])} but neither {SINGLE_FILE} nor {INDEX_FILE}, which say what to load"
    if pickles := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        return (
            f"{path} has pickle weights only ({quote(pickles[0])}), which can run code when loaded; "
            "convert the checkpoint to safetensors (`save_pretrained` of transformers writes it)"
        )
    return f"{path} has no safetensors weights; expected {SINGLE_FILE} or {INDEX_FILE}"


def _check_unique(path: Path, headers: Mapping[str, Header]) -> None:
    seen: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.tensors:
            if name in seen:
                raise ValueError(
                    f"{path} has tensor {quote(name)} in both {quote(seen[name])} and {quote(file)}; download it again"
                )
            seen[name] = file


def _check_index(
    path: Path, index: Mapping[str, Any], headers: Mapping[str, Header], config: Mapping[str, Any]
) -> None:
    tied = config.get("tie_word_embeddings") is True
    head = f"{family_of(config).names.head}.weight"
    for name, file in index["weight_map"].items():
        # Some tools list a head that is the embedding and write it once; transformers and vLLM never ask for it.
        if name not in headers[file].tensors and not (tied and name == head):
            raise ValueError(
                f"{path / INDEX_FILE} says that {quote(file)} holds tensor {quote(name)}, but it does not; "
                "download both again"
            )
