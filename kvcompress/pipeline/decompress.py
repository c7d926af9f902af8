"""A compressed checkpoint back to a plain Hugging Face one: the codec is dropped, the weights are as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcompress.checkpoint import json_file, writer
from kvcompress.checkpoint.atomic import check_free_space
from kvcompress.checkpoint.manifest import Manifest
from kvcompress.checkpoint.reader import CONFIG_FILE, Checkpoint, is_compressed
from kvcompress.checkpoint.verify import require_verified, verify
from kvcompress.checkpoint.workdir import WorkDir, check_output
from kvcompress.methods.base import TransformMethod
from kvcompress.methods.context import Progress
from kvcompress.methods.registry import METHODS
from kvcompress.pipeline.stages import bytes_progress


def decompress(directory: str | Path, out: str | Path, progress: Progress) -> None:
    """Write the plain checkpoint of a compressed one.

    A cache codec leaves weights untouched, so every shard is the base model's, byte for byte. Stages that changed the
    checkpoint itself are undone as far as the compressed weights tell.

    Raises:
        ValueError: not a compressed checkpoint, a damaged one, or `out` cannot be written.
    """
    checkpoint = Checkpoint.open(directory)
    if not is_compressed(checkpoint.config):
        raise ValueError(
            f"{directory} is not compressed by kvcompress; expected a folder with kvcompress/manifest.json"
        )
    target = check_output(out, resume=True)
    progress("verifying", 0, 1)
    require_verified(verify(checkpoint.path), directory)
    manifest = Manifest.load(checkpoint.path)
    check_free_space(target, checkpoint.weights_bytes + (1 << 20))
    with WorkDir.open(target, {"decompress": manifest.sha256}, resume=True) as work:
        transform, config = _restore(checkpoint, manifest)
        writer.copy_shards(checkpoint, work, transform, bytes_progress(progress, checkpoint.weights_bytes))
        writer.copy_side_files(checkpoint, work)
        config = {key: value for key, value in config.items() if key != "quantization_config"}
        writer.write_file(work, CONFIG_FILE, json_file.pretty(config))
        work.publish()


def _restore(checkpoint: Checkpoint, manifest: Manifest) -> tuple[writer.Transform | None, dict[str, Any]]:
    """What undoes the stages, and config.json after it."""
    found = []
    for stage in manifest.stages:
        method = METHODS.get(stage["method"])
        restored = method.restore(checkpoint) if isinstance(method, TransformMethod) else None
        if restored is not None:
            found.append((stage["method"], restored))
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise ValueError(f"{names} both changed the weights; decompress undoes one such stage; use the base model")
    return found[0][1] if found else (None, dict(checkpoint.config))
