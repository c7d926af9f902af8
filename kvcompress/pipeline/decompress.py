"""A compressed checkpoint back to a plain Hugging Face one: codec dropped, factored weights multiplied out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompress.checkpoint import json_file, writer
from kvcompress.checkpoint.atomic import check_free_space
from kvcompress.checkpoint.manifest import Manifest
from kvcompress.checkpoint.quantized import base_section
from kvcompress.checkpoint.reader import CONFIG_FILE, Checkpoint, is_compressed
from kvcompress.checkpoint.safetensors_file import TensorInfo, TensorSpec
from kvcompress.checkpoint.verify import require_verified, verify
from kvcompress.checkpoint.workdir import WorkDir, check_output
from kvcompress.methods.base import TransformMethod
from kvcompress.methods.context import Progress
from kvcompress.methods.registry import METHODS
from kvcompress.modeling.low_rank import DOWN, UP, product, ranks_of
from kvcompress.pipeline.stages import bytes_progress

if TYPE_CHECKING:
    from torch import Tensor


def decompress(directory: str | Path, out: str | Path, progress: Progress) -> None:
    """Write the plain checkpoint of a compressed one.

    A cache codec leaves weights untouched: without other stages every shard is the base model's, byte for byte, and
    weights that the base model quantizes stay quantized. Stages that changed the checkpoint itself are undone as far as
    the compressed weights tell.

    Raises:
        ValueError: not a compressed checkpoint, a damaged one, or `out` cannot be written.
    """
    checkpoint = Checkpoint.open(directory)
    if not is_compressed(checkpoint.config):
        raise ValueError(
            f"{directory} is not compressed by kvcompress; expected a folder with kvcompress/manifest.json"
        )
    target = check_output(out, resume=True)
    hashed = bytes_progress(progress, "verifying", checkpoint.weights_bytes)
    require_verified(verify(checkpoint.path, hashed), directory)
    manifest = Manifest.load(checkpoint.path)
    dense = Dense(checkpoint)
    check_free_space(target, dense.weights_bytes + (1 << 20))
    with WorkDir.open(target, {"decompress": manifest.sha256}, resume=True) as work:
        restored, config = _restore(checkpoint, manifest)
        transform = restored or dense
        writer.copy_shards(
            checkpoint, work, transform, bytes_progress(progress, "writing weights", checkpoint.weights_bytes)
        )
        writer.copy_side_files(checkpoint, work)
        config = {key: value for key, value in config.items() if key != "quantization_config"}
        if (base := base_section(checkpoint.config)) is not None:
            config["quantization_config"] = base
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
