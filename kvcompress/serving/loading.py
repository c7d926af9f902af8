"""Reading the codec of a compressed checkpoint: what both serving integrations start from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvcompress.checkpoint.reader import CONFIG_VERSION, is_compressed
from kvcompress.checkpoint.safetensors_file import load_tensors
from kvcompress.checkpoint.verify import CODEC_FILE, STATEMENT_FILE
from kvcompress.codec.canary import ModelStatement
from kvcompress.codec.contract import CacheCodec
from kvcompress.codec.file import from_tensors
from kvcompress.codec.nested import WIDEST, check_bits, check_share, cut_codecs, cut_spec
from kvcompress.codec.spec import CodecSpec

KV_RANK = "KVCOMPRESS_KV_RANK"
"""Environment variable: the share of the stored channels at which vLLM serves."""

KV_BITS = "KVCOMPRESS_KV_BITS"
"""Environment variable: the most bits in which vLLM stores a channel."""

CANARY = "KVCOMPRESS_CANARY"
"""Environment variable: 0 lets vLLM serve without the start-up canary."""


def canary_is_asked_for() -> bool:
    """What `CANARY` says."""
    return os.environ.get(CANARY) != "0"


def ask_for(kv_rank: float, kv_bits: int) -> None:
    """Have vLLM, here and in processes started from here, serve with that much of the codec."""
    os.environ |= {KV_RANK: f"{kv_rank:g}", KV_BITS: str(kv_bits)}


def kv_rank() -> float:
    """What `KV_RANK` says; 1 where it is not set.

    Raises:
        ValueError: it is no share.
    """
    text = os.environ.get(KV_RANK) or "1"
    try:
        return check_share(float(text))
    except ValueError:
        raise ValueError(f"found {KV_RANK}={text}; expected a share of the stored channels, such as 0.5") from None


def kv_bits() -> int:
    """What `KV_BITS` says; no limit where it is not set.

    Raises:
        ValueError: it is no code width.
    """
    text = os.environ.get(KV_BITS) or str(WIDEST)
    try:
        return check_bits(int(text))
    except ValueError:
        raise ValueError(f"found {KV_BITS}={text}; expected a code width, such as 4") from None


def read_spec(config: Mapping[str, Any]) -> CodecSpec:
    """The codec described by a compressed checkpoint's config.json.

    Raises:
        ValueError: the checkpoint is not compressed, or by a format this version does not read.
    """
    section = config.get("quantization_config") or {}
    if not is_compressed(config):
        raise ValueError("config.json has no kvcompress section; expected a folder written by `kvcompress compress`")
    if section.get("version") != CONFIG_VERSION:
        raise ValueError(
            f"the checkpoint has kvcompress format {section.get('version')!r}; this version reads {CONFIG_VERSION}; "
            "upgrade kvcompress or compress the base model again"
        )
    return CodecSpec.from_json(section["codec"])


def load_codec(
    directory: Path, spec: CodecSpec | None = None, kv_rank: float = 1.0, kv_bits: int = WIDEST
) -> list[CacheCodec | None]:
    """Every layer's codec; None where the layer keeps an ordinary cache.

    Args:
        directory: a compressed checkpoint.
        spec: its description, if the caller has read it from config.json already.
        kv_rank: share of the stored channels to keep; the codec is cut as it is loaded.
        kv_bits: the most bits in which a channel is stored; wider codes become narrower.

    Raises:
        ValueError: the folder is not a compressed checkpoint, or its codec file does not fit its config.json.
    """
    if spec is None:
        config = directory / "config.json"
        if not config.is_file():
            raise ValueError(f"{directory} has no config.json; expected a folder written by `kvcompress compress`")
        spec = read_spec(json.loads(config.read_text()))
    path = directory / CODEC_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing; the folder is not a complete compressed checkpoint")
    return cut_codecs(from_tensors(spec, load_tensors(path)), cut_spec(spec, kv_rank, kv_bits))


def load_statement(directory: Path) -> ModelStatement | None:
    """What the checkpoint's codec states of itself; None for one that states nothing.

    Raises:
        ValueError: the statement cannot be read.
    """
    path = directory / STATEMENT_FILE
    return ModelStatement.from_json(json.loads(path.read_text())) if path.is_file() else None
