"""The sha256 of everything in a folder, gathered while it is written and compared when it is verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KEY_SEPARATOR = "::"


def tensor_key(file: str, name: str) -> str:
    """The key of a tensor in a manifest: `model.safetensors::lm_head.weight`. File names hold no `::`, tensors may."""
    return f"{file}{KEY_SEPARATOR}{name}"


def split_key(key: str) -> tuple[str, str]:
    """File and tensor name of a key made by `tensor_key`."""
    file, _, name = key.partition(KEY_SEPARATOR)
    return file, name


@dataclass(frozen=True)
class Digests:
    """sha256, as hex, by what it covers. Add parts with `|`.

    Attributes:
        tensors: a tensor's bytes, by `tensor_key`.
        headers: length field and JSON header of a safetensors file, by relative path.
        files: a whole file that is not safetensors, by relative path.
    """

    tensors: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def __or__(self, other: Digests) -> Digests:
        return Digests(self.tensors | other.tensors, self.headers | other.headers, self.files | other.files)

    def to_json(self) -> dict[str, dict[str, str]]:
        return {"tensors": self.tensors, "headers": self.headers, "files": self.files}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Digests:
        return cls(dict(data["tensors"]), dict(data["headers"]), dict(data["files"]))
