"""kvcompress/manifest.json: what was done to a checkpoint, from what, and the sha256 of every byte of the result."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

import kvcompress
from kvcompress.checkpoint import json_file
from kvcompress.checkpoint.digests import Digests, split_key
from kvcompress.checkpoint.hashing import sha256_file
from kvcompress.checkpoint.paths import check_relative, inside
from kvcompress.checkpoint.reader import CONFIG_FILE, INDEX_FILE, Checkpoint

FORMAT_VERSION = 1
MANIFEST_FILE = "kvcompress/manifest.json"
RECORDED_PACKAGES = ("torch", "transformers", "safetensors", "numpy")
SELF_DIGEST = "sha256"


class ManifestDamagedError(ValueError):
    """manifest.json is not what was written. `expected` and `found` say how."""

    def __init__(self, path: Path, expected: str, found: str) -> None:
        super().__init__(f"{path} was changed after it was written: expected {expected}, found {found}; get a new copy")
        self.expected = expected
        self.found = found


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Parent(_Part):
    """The checkpoint that was compressed.

    `source` is what the user gave; `files` has the sha256 of config.json, the index and each shard, as the hub shows
    it for large files.
    """

    source: str
    files: dict[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint, source: str | Path, progress: Callable[[int], None] | None = None) -> Parent:
        """Hash a checkpoint: every byte is read once.

        Args:
            progress: called with the number of bytes hashed since the last call.
        """
        names = [CONFIG_FILE, *([INDEX_FILE] if checkpoint.index is not None else []), *checkpoint.shards]
        with ThreadPoolExecutor(2) as pool:
            digests = pool.map(partial(sha256_file, progress=progress), map(checkpoint.file, names))
        return cls(source=str(source), files=dict(zip(names, digests, strict=True)))


class Calibration(_Part):
    """The text that statistics were taken from, and where they were computed; `sha256` covers its tokens.

    `sampling` says how the model was sampled where it wrote the text itself.
    """

    name: str
    sha256: str
    samples: int
    tokens: int
    device: str
    dtype: str
    sampling: dict[str, Any] | None = None

    def inputs(self) -> dict[str, Any]:
        """What is known of it before any work: the digest of text that the model is yet to write is not."""
        data = self.model_dump(mode="json")
        if self.sampling is not None:
            del data["sha256"]
        return data


class Sizes(_Part):
    """Bytes before and after."""

    base: int | float
    compressed: int | float


class BytesPerToken(Sizes):
    """Bytes of KV cache one token takes, all layers together; `ratio` is base / compressed."""

    ratio: float


class Accepted(_Part):
    """A side file that an operator has changed, or added (`before` is None), and taken responsibility for."""

    file: str
    before: str | None
    after: str
    when: str
    """UTC, ISO 8601."""


class Manifest(_Part):
    """The manifest's fields. `sha256` is over the canonical JSON of all others, and is filled in by `to_bytes`.

    `tensors`, `headers` and `files` are as in `Digests`, and together cover every byte of the folder but this file,
    which covers itself. `accepted` is left out while it is empty.
    """

    format_version: int = FORMAT_VERSION
    kvcompress_version: str = kvcompress.__version__
    parent: Parent
    recipe: dict[str, Any]
    seed: int
    calibration: Calibration | None
    versions: dict[str, str]
    bytes_per_token: BytesPerToken
    weights_bytes: Sizes
    stages: list[dict[str, Any]] = Field(default_factory=list)
    layers: list[dict[str, Any]] = Field(default_factory=list)
    quality: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    headers: dict[str, str] = Field(default_factory=dict)
    tensors: dict[str, str] = Field(default_factory=dict)
    accepted: list[Accepted] = Field(default_factory=list)
    sha256: str = ""

    @field_validator("files", "headers", "tensors")
    @classmethod
    def _inside_the_folder(cls, digests: dict[str, str]) -> dict[str, str]:
        for key in digests:
            check_relative(split_key(key)[0], MANIFEST_FILE)
        return digests

    @property
    def digests(self) -> Digests:
        """Everything the manifest covers."""
        return Digests(self.tensors, self.headers, self.files)

    def fingerprint(self) -> dict[str, Any]:
        """The inputs it records, as the free function `fingerprint` gives them."""
        return fingerprint(self.recipe, self.seed, self.calibration, self.parent, self.versions)

    def to_bytes(self) -> bytes:
        """The file's content, with its own digest."""
        data = self.model_dump(mode="json", exclude=None if self.accepted else {"accepted"})
        return json_file.pretty({**data, SELF_DIGEST: _self_digest(data)})

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read and check the manifest of a compressed checkpoint.

        Raises:
            ManifestDamagedError: it is not the bytes that were written (also a ValueError).
            ValueError: there is none, or it was written by a newer format version.
        """
        path = inside(Path(directory), MANIFEST_FILE)
        if not path.is_file():
            raise ValueError(f"{directory} has no {MANIFEST_FILE}; expected a checkpoint compressed by kvcompress")
        raw = path.read_bytes()
        try:
            data = json_file.parse_object(raw, MANIFEST_FILE)
            found, layout = _self_digest(data), json_file.pretty(data)
        except (ValueError, RecursionError) as error:
            raise ManifestDamagedError(path, "JSON", str(error)) from error
        if data.get(SELF_DIGEST) != found:
            raise ManifestDamagedError(path, f"sha256 {data.get(SELF_DIGEST)}", found)
        if layout != raw:
            raise ManifestDamagedError(path, "the layout kvcompress writes", "other white space or number formats")
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, this kvcompress {kvcompress.__version__} reads "
                f"{FORMAT_VERSION}; update kvcompress"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ManifestDamagedError(path, "the manifest's fields", f"{where}: {first['msg']}") from error


def fingerprint(
    recipe: Mapping[str, Any],
    seed: int,
    calibration: Calibration | None,
    parent: Parent,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """All that the output's bytes depend on, for `WorkDir.open` and `is_published`."""
    return {
        "recipe": dict(recipe),
        "seed": seed,
        "calibration": calibration.inputs() if calibration else None,
        "parent": parent.model_dump(mode="json"),
        "versions": dict(versions),
    }


def is_published(out: str | Path, inputs: Mapping[str, Any]) -> bool:
    """Whether `out` is a finished checkpoint made from these inputs: a resumed run has nothing left to do."""
    try:
        recorded = Manifest.load(out).fingerprint()
    except (OSError, ValueError):
        return False
    return json_file.canonical(recorded) == json_file.canonical(inputs)


def package_versions(packages: Sequence[str] = RECORDED_PACKAGES) -> dict[str, str]:
    """Versions of Python, kvcompress and the installed packages that results may depend on; imports none of them."""
    found = {"python": platform.python_version(), "kvcompress": kvcompress.__version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _self_digest(data: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in data.items() if key != SELF_DIGEST}
    return hashlib.sha256(json_file.canonical(rest)).hexdigest()
