"""Before the first token: find the checkpoint, check that it is what was compressed, load the codec, tell the operator.

Runs in the worker processes, while they build the model. The first rank of each machine verifies: once per copy of
the files on disk and no more, in a process whose failure stops the engine, before its weights are read. (Hashing
reads the files into the page cache, from where the weight loader then takes them.)
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvcompress.checkpoint.verify import require_verified, verify_codec
from kvcompress.codec.forms import CacheCodec
from kvcompress.codec.nested import cut_codecs
from kvcompress.codec.shared_spec import SharedSpec
from kvcompress.codec.spec import CacheSpec, CodecSpec
from kvcompress.serving.loading import load_codec
from kvcompress.serving.vllm import compat, limits
from kvcompress.serving.vllm.report import LayerReport, describe
from kvcompress.serving.vllm.shared_backend import LayerGroup

SKIP_VERIFY = "KVCOMPRESS_SKIP_VERIFY"
"""Set to 1 to leave out the hashing of model weights; the codec and the manifest are checked in any case."""


@dataclass
class Startup:
    """One model's start in one worker: the codec of this rank's heads, and what each layer was given."""

    vllm_config: compat.VllmConfig
    codecs: list[CacheCodec | None]
    groups: dict[tuple[int, ...], LayerGroup] = field(default_factory=dict)
    _layers: dict[int, LayerReport] = field(default_factory=dict)
    _reported: bool = False

    @classmethod
    def begin(cls, vllm_config: compat.VllmConfig, stored: CodecSpec, spec: CodecSpec) -> Startup:
        """Check and load everything that does not depend on a particular layer.

        Args:
            stored: the codec as the checkpoint has it.
            spec: the same, or cut to a smaller rank.

        Raises:
            ValueError: the engine cannot serve this codec, or the checkpoint is not what was compressed.
        """
        limits.check_engine(vllm_config, spec)
        directory = checkpoint_directory(vllm_config)
        if compat.is_first_rank_of_machine():
            check_files(directory)
        # vLLM builds models under a default device; a codec waits on the CPU until the weights are there.
        with torch.device("cpu"):
            codecs = cut_codecs(load_codec(directory, stored), spec)
            limits.check_rope(vllm_config, codecs)
        return cls(vllm_config, codecs)

    def codec_of(self, index: int) -> CacheCodec:
        """The codec of the KV heads of this tensor-parallel rank, on the CPU."""
        codec = self.codecs[index]
        assert codec is not None
        return codec.heads(*heads_of_rank(codec.spec.num_kv_heads, *compat.tensor_parallel()))

    def join_group(self, spec: SharedSpec, layer: Any, name: str) -> LayerGroup:
        """The group of layers that share a latent, with one more of them in it; layers come in the model's order."""
        group = self.groups.setdefault(spec.group, LayerGroup(len(spec.group)))
        group.join(layer, name, spec)
        return group

    def note_compressed(self, index: int, spec: CacheSpec) -> None:
        self._layers[index] = LayerReport(spec.bytes_per_token, self._full_bytes(spec.num_kv_heads, spec.head_dim))

    def note_uncompressed(self, index: int, layer: Any) -> None:
        size = self._full_bytes(layer.num_kv_heads, layer.head_size)
        why = "left out by the recipe" if layer.sliding_window is None else f"sliding window of {layer.sliding_window}"
        self._layers[index] = LayerReport(size, size, why)

    def report(self) -> None:
        """Tell the operator, once, what the cache takes. Call when all layers are known."""
        if not self._reported:
            self._reported = True
            rank, size = compat.tensor_parallel()
            dtype = str(self.vllm_config.model_config.dtype).removeprefix("torch.")
            where = f" on tensor-parallel rank {rank} of {size}" if size > 1 else ""
            compat.logger.info("kvcompress: %s", describe(self._layers, dtype) + where)

    def _full_bytes(self, num_kv_heads: int, head_dim: int) -> int:
        element: torch.dtype = self.vllm_config.model_config.dtype
        return 2 * num_kv_heads * head_dim * element.itemsize


def heads_of_rank(num_kv_heads: int, rank: int, world_size: int) -> tuple[int, int]:
    """The KV heads [start, stop) that vLLM gives one tensor-parallel rank; with fewer heads than ranks, ranks share."""
    start = rank * num_kv_heads // world_size
    return start, start + max(1, num_kv_heads // world_size)


def checkpoint_directory(vllm_config: compat.VllmConfig) -> Path:
    """The checkpoint's folder on this machine; a hub id is completed by the files vLLM itself does not download."""
    model, load = vllm_config.model_config, vllm_config.load_config
    directory = Path(model.model)
    if directory.is_dir():
        return directory
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(model.model, revision=model.revision, cache_dir=load.download_dir))


def check_files(directory: Path) -> None:
    """Compare the checkpoint with its manifest.

    Raises:
        ValueError: naming the first tensor that differs.
    """
    skip_weights = os.environ.get(SKIP_VERIFY, "0") == "1"
    report = verify_codec(directory, verify_weights=not skip_weights)
    require_verified(report, directory)
    weights = f"weights not hashed, as {SKIP_VERIFY}=1 asks" if skip_weights else "weights included"
    compat.logger.info("kvcompress: %s agrees with its manifest in %d hashes, %s", directory, report.checked, weights)
