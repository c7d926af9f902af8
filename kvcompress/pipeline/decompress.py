"""A compressed checkpoint back to a plain Hugging Face one: codec dropped, factored weights multiplied out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvcompress.checkpoint import json_file, writer
from kvcompress.checkpoint.atomic import check_free_space
from kvcompress.checkpoint.manifest import Manifest
from kvcompress.checkpoint.reader import CONFIG_FILE, Checkpoint, is_compressed
from kvcompress.checkpoint.safetensors_file import TensorInfo, TensorSpec
from kvcompress.checkpoint.verify import require_verified, verify
from kvcompress.checkpoint.workdir import WorkDir, check_output
from kvcompress.methods.context import Progress
from kvcompress.modeling.low_rank import DOWN, UP, product, ranks_of
from kvcompress.pipeline.stages import bytes_progress

if TYPE_CHECKING:
    from torch import Tensor


def decompress(directory: str | Path, out: str | Path, progress: Progress) -> None:
    """Write the plain checkpoint of a compressed one.

    A cache codec leaves weights untouched: without factored weights every shard is the base model's, byte for byte.

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
    dense = Dense(checkpoint)
    check_free_space(target, dense.weights_bytes + (1 << 20))
    with WorkDir.open(target, {"decompress": manifest.sha256}, resume=True) as work:
        writer.copy_shards(checkpoint, work, dense, bytes_progress(progress, checkpoint.weights_bytes))
        writer.copy_side_files(checkpoint, work)
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        writer.write_file(work, CONFIG_FILE, json_file.pretty(config))
        work.publish()


class Dense:
    """Makes one weight of every pair of factors while shards are copied (`checkpoint.writer.Transform`)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = ranks_of(checkpoint.config).keys()

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors once dense; factors and weights have one dtype."""
        total = self._checkpoint.weights_bytes
        for name in self._names:
            down, up = (self._checkpoint.tensors[f"{name}.{side}"] for side in (DOWN, UP))
            total += down.nbytes // down.shape[0] * up.shape[0] - down.nbytes - up.nbytes
        return total

    def plan(self, info: TensorInfo) -> Sequence[TensorSpec] | None:
        name, _, part = info.name.rpartition(".")
        if name not in self._names or part not in (DOWN, UP):
            return None
        if part == DOWN:
            return []
        shape = (info.shape[0], self._checkpoint.tensors[f"{name}.{DOWN}"].shape[1])
        return [TensorSpec(f"{name}.weight", info.dtype, shape)]

    def apply(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        module, _, part = name.rpartition(".")
        if part == UP:
            yield f"{module}.weight", product(self._checkpoint.read(f"{module}.{DOWN}"), tensor)
