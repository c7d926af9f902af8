"""Before the first token: find the checkpoint, check that it is what was compressed, load the codec, tell the operator.

Runs in the worker processes, while they build the model, and once more when weights and caches are there. The first
rank of each machine verifies: once per copy of the files on disk and no more, in a process whose failure stops the
engine, before its weights are read. (Hashing reads the files into the page cache, from where the weight loader then
takes them.)
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvcompress.checkpoint.verify import require_verified, verify_codec
from kvcompress.codec.canary import ModelStatement, unstated_prompt
from kvcompress.codec.contract import CacheCodec
from kvcompress.codec.nested import cut_codecs
from kvcompress.codec.shared.spec import SharedSpec
from kvcompress.codec.spec import CodecSpec
from kvcompress.serving.loading import CANARY, canary_is_asked_for, load_codec, load_statement
from kvcompress.serving.vllm import canary, compat, limits
from kvcompress.serving.vllm.metrics import Numbers
from kvcompress.serving.vllm.report import (
    KERNELS,
    KERNELS_ALONE,
    TORCH,
    LayerReport,
    describe,
    describe_attention,
    describe_capacity,
    totals,
)
from kvcompress.serving.vllm.sentinel import Sentinel
from kvcompress.serving.vllm.served import Served
from kvcompress.serving.vllm.shared import LayerGroup

SKIP_VERIFY = "KVCOMPRESS_SKIP_VERIFY"
"""Set to 1 to leave out the hashing of model weights; the codec and the manifest are checked in any case."""


@dataclass
class Startup:
    """One model's start in one worker: the codec of this rank's heads, and what each layer was given."""

    vllm_config: compat.VllmConfig
    codecs: list[CacheCodec | None]
    statement: ModelStatement | None = None
    served: dict[int, Served] = field(default_factory=dict)
    """Layers with a compressed cache, by their number."""
    sentinel: Sentinel | None = None
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
            statement = load_statement(directory)
        if statement is not None and spec != stored:
            statement = statement.without_errors()
        return cls(vllm_config, codecs, statement)

    def codec_of(self, index: int) -> CacheCodec:
        """The codec of the KV heads of this tensor-parallel rank, on the CPU."""
        codec = self.codecs[index]
        assert codec is not None
        return codec.heads(*self._heads(codec.spec.num_kv_heads))

    def join_group(self, spec: SharedSpec, layer: Any, name: str) -> LayerGroup:
        """The group of layers that share a latent, with one more of them in it; layers come in the model's order."""
        group = self.groups.setdefault(spec.group, LayerGroup(len(spec.group)))
        group.join(layer, name, spec)
        return group

    def note_compressed(self, index: int, layer: Any, codec: CacheCodec, request_bytes: int = 0) -> None:
        """A layer was given the codec of this rank's KV heads."""
        spec = codec.spec
        full = self._full_bytes(spec.num_kv_heads, spec.head_dim)
        self._layers[index] = LayerReport(spec.bytes_per_token, full, request_bytes=request_bytes)
        stated = None if self.statement is None else self.statement.layers[index]
        if stated is not None:
            whole = self.codecs[index]
            assert whole is not None
            heads = self._heads(whole.spec.num_kv_heads)
            stated = {side: of.heads(*heads) for side, of in stated.items()}
        self.served[index] = Served(index, layer, codec, stated)

    def note_uncompressed(self, index: int, layer: Any) -> None:
        if layer.attn_backend.get_name() in (compat.LATENT_BACKEND_NAME, compat.DEVICE_LATENT_BACKEND_NAME):
            self.served[index] = Served(index, layer, None)
            config = self.vllm_config.model_config.hf_text_config
            start, stop = self._heads(config.num_key_value_heads)
            stored = layer.head_size * self.vllm_config.model_config.dtype.itemsize
            self._layers[index] = LayerReport(stored, self._full_bytes(stop - start, config.head_dim))
            return
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
            if not compat.is_cpu():
                attended = {index: _attended_by(served.layer) for index, served in self.served.items()}
                tell = compat.logger.warning if TORCH in attended.values() else compat.logger.info
                tell("kvcompress: %s", describe_attention(attended))

    def caches_ready(self, runner: Any, cache_config: Any) -> None:
        """Last checks and numbers, in a worker whose weights and caches are there.

        Raises:
            ValueError: the canary found a layer that does not do what it should.
        """
        layers = [self.served[index] for index in sorted(self.served)]
        if not layers:
            return
        capacity = compat.capacity_tokens(self.vllm_config, cache_config)
        if canary_is_asked_for():
            canary.run(runner, self.vllm_config, layers, self._prompt())
        else:
            compat.logger.warning("kvcompress: no start-up canary, as %s=0 asks", CANARY)
        compat.logger.info("kvcompress: %s", describe_capacity(self._layers, capacity))
        numbers = Numbers(*compat.worker_names(self.vllm_config), *totals(self._layers), capacity)
        self.sentinel = Sentinel(layers, numbers)

    def _prompt(self) -> list[int]:
        if self.statement is not None:
            return self.statement.tokens
        return unstated_prompt(self.vllm_config.model_config.get_vocab_size())

    def _heads(self, num_kv_heads: int) -> tuple[int, int]:
        return heads_of_rank(num_kv_heads, *compat.tensor_parallel())

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


def _attended_by(layer: Any) -> str:
    """What attends a layer on a GPU, in the report's words."""
    if not layer.impl.on_kernels:
        return TORCH
    builder = layer.attn_backend.get_builder_cls()
    return KERNELS_ALONE if builder._cudagraph_support is compat.AttentionCGSupport.NEVER else KERNELS
