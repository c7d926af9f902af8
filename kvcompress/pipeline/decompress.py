"""A compressed checkpoint back to a plain Hugging Face one: the codec is dropped, the weights are as they were."""

from __future__ import annotations

from pathlib import Path

from kvcompress.checkpoint import json_file, writer
from kvcompress.checkpoint.atomic import check_free_space
from kvcompress.checkpoint.manifest import Manifest
from kvcompress.checkpoint.reader import CONFIG_FILE, Checkpoint, is_compressed
from kvcompress.checkpoint.verify import require_verified, verify
from kvcompress.checkpoint.workdir import WorkDir, check_output
from kvcompress.methods.context import Progress
from kvcompress.pipeline.stages import bytes_progress


def decompress(directory: str | Path, out: str | Path, progress: Progress) -> None:
    """Write the plain checkpoint of a compressed one.

    A cache codec leaves weights untouched, so every shard is the base model's, byte for byte.

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
        writer.copy_shards(checkpoint, work, progress=bytes_progress(progress, checkpoint.weights_bytes))
        writer.copy_side_files(checkpoint, work)
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        writer.write_file(work, CONFIG_FILE, json_file.pretty(config))
        work.publish()
