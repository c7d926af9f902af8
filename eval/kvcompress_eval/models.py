"""What the suite must know of a model folder: compressed or not, bytes per token, context, end tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcompress.checkpoint.json_file import read_object
from kvcompress.codec.nested import WIDEST, cut_spec
from kvcompress.codec.spec import CodecSpec
from kvcompress.families import family_of
from kvcompress.geometry import ModelGeometry
from kvcompress.model_config import parse
from kvcompress_eval.tokenizer import TextTokenizer

MANIFEST = "kvcompress/manifest.json"
CODEC = "kvcompress/codec.safetensors"


@dataclass(frozen=True)
class Model:
    """One model of an evaluation."""

    name: str
    """Unique within the evaluation and fit for a file name."""
    path: str
    """As the user gave it."""
    folder: Path
    role: str
    """baseline or candidate."""
    compressed: bool
    bytes_per_token: float | None
    """KV cache bytes per token over all layers, every scale and gain included; None where the config does not say."""
    manifest_sha256: str | None
    context: int | None
    """Longest sequence in tokens that the model was made for."""
    fingerprint: str
    """Hash that changes whenever the folder's weights, codec or config do; names results that may be reused."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        ValueError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; expected a model folder")
    return read_object(path)


def is_compressed(folder: Path) -> bool:
    """Whether the folder's cache goes through a kvcompress codec."""
    return codec_spec(read_config(folder)) is not None


def codec_spec(config: dict[str, Any]) -> CodecSpec | None:
    """The codec that config.json describes, if any."""
    section = config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != "kvcompress" or not section.get("codec"):
        return None
    return CodecSpec.from_json(section["codec"])


def end_tokens(folder: Path, tokenizer: TextTokenizer) -> frozenset[int]:
    """Tokens that end a sequence, the same for every engine: generation_config.json's, else config.json's, else the
    tokenizer's own. Empty where none of them names any.

    What a chat template writes behind a turn is not asked: a server would not stop there either.

    Raises:
        ValueError: a file is not JSON, or names something that is no token of the vocabulary.
    """
    generation = folder / "generation_config.json"
    named = (
        _named_tokens(read_object(path).get("eos_token_id"), f"{path}: eos_token_id", tokenizer)
        for path in (generation, folder / "config.json")
        if path.is_file()
    )
    return next((found for found in named if found), frozenset(tokenizer.end))


def _check_end_ids(config: dict[str, Any], path: Path) -> None:
    """Refuse what no model class can read, before the tokenizer is loaded, which needs config.json, too."""
    named = config.get("eos_token_id")
    for item in named if isinstance(named, list) else [] if named is None else [named]:
        if type(item) is not int:
            raise ValueError(f"{path}: eos_token_id: found {json.dumps(named)}; expected an id, or a list of ids")


def _named_tokens(value: Any, where: str, tokenizer: TextTokenizer) -> frozenset[int]:
    """Ids of a token, or of a list of them, given by id or by text; a null names none."""
    found = set()
    for item in value if isinstance(value, list) else [value]:
        token = tokenizer.token_id(item) if isinstance(item, str) else item
        if item is not None and (type(token) is not int or not 0 <= token < tokenizer.size):
            raise ValueError(
                f"{where}: found {json.dumps(item)}; expected ids below {tokenizer.size}, or tokens of the tokenizer"
            )
        found |= set() if token is None else {token}
    return frozenset(found)


def describe_models(
    candidates: Sequence[str | Path], baseline: str | Path | None, kv_rank: float = 1.0, kv_bits: int = WIDEST
) -> list[Model]:
    """Read every model folder, the baseline first.

    Args:
        kv_rank: share of the stored channels at which compressed models will run.
        kv_bits: the most bits in which they will store a channel.

    Raises:
        ValueError: none was given, one is no model folder, or one cannot be run at that share or in those bits.
    """
    from kvcompress.checkpoint.source import resolve

    given = [] if baseline is None else [(str(baseline), "baseline")]
    given += [(str(path), "candidate") for path in candidates]
    if not given:
        raise ValueError("nothing to evaluate: give at least one model folder")
    models: list[Model] = []
    for path, role in given:
        folder = Path(resolve(path))
        config = read_config(folder)
        spec = codec_spec(config)
        # A single uncompressed model is its own reference point.
        if len(given) == 1 and spec is None:
            role = "baseline"
        served = None if spec is None else cut_spec(spec, kv_rank, kv_bits)
        models.append(_describe(path, folder, config, role, served, {model.name for model in models}))
    return models


def _describe(
    path: str, folder: Path, config: dict[str, Any], role: str, spec: CodecSpec | None, taken: set[str]
) -> Model:
    stem = Path(path.rstrip("/")).name or folder.resolve().name
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    manifest = folder / MANIFEST
    _check_end_ids(config, folder / "config.json")
    try:
        size, context = bytes_per_token(config, spec), _context(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return Model(
        name=name,
        path=path,
        folder=folder,
        role=role,
        compressed=spec is not None,
        bytes_per_token=size,
        manifest_sha256=hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None,
        context=context,
        fingerprint=fingerprint(folder),
    )


def bytes_per_token(config: dict[str, Any], spec: CodecSpec | None) -> float | None:
    """KV cache bytes per token of one model, as it is served; None for an unknown architecture."""
    geometry = _geometry(config)
    if geometry is None:
        return None
    plain = geometry.kv_bytes_per_token()
    if spec is None:
        return plain
    plain_layer = plain / geometry.num_layers
    return sum(plain_layer if layer is None else layer.bytes_per_token for layer in spec.layers)


def _geometry(config: dict[str, Any]) -> ModelGeometry | None:
    """Sizes of a model; None for one that we know nothing of, which may still be evaluated as it is.

    Raises:
        ValueError: an architecture that we know, with keys that its model class cannot read.
    """
    try:
        found = parse(config)
    except ValueError:
        if family_of(config).tried:
            return None
        raise
    try:
        return ModelGeometry.of(found)
    except ValueError:  # heads of a size that our records do not take
        return None


def _context(config: dict[str, Any]) -> int | None:
    """Tokens the model can take, what RoPE scaling adds included; None where config.json does not say."""
    geometry = _geometry(config)
    if geometry is not None:
        return geometry.context
    found = config.get("max_position_embeddings")
    return found if type(found) is int and found > 0 else None


def fingerprint(folder: Path) -> str:
    """Hash over config, manifest, codec and the size and modification time of every weight file."""
    digest = hashlib.sha256()
    for name in ("config.json", "generation_config.json", MANIFEST, CODEC):
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
