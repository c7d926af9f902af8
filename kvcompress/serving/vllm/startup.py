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
from kvcompress.codec.spec import CodecSpec
from kvcompress.forms import FORMS
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

SKIP_VERIFY = "KVCOMPRESS_SKIP_VERIFY"
"""Set to 1 to leave out the hashing of model weights; the codec and the manifest are checked in any case."""


@dataclass
class Startup:
    """One model's start in one worker: the codec of this rank's heads, and what each layer was given."""

    engine: compat.Engine
    codecs: list[CacheCodec | None]
    statement: ModelStatement | None = None
    served: dict[int, Served] = field(default_factory=dict)
    """Layers with a compressed cache, by their number."""
    sentinel: Sentinel | None = None
    _members: dict[tuple[int, ...], list[Any]] = field(default_factory=dict)
    """Whatever layers that are decoded together hand each other, by their numbers."""
    _layers: dict[int, LayerReport] = field(default_factory=dict)
    _reported: bool = False

    @classmethod
    def begin(cls, engine: compat.Engine, stored: CodecSpec, spec: CodecSpec) -> Startup:
        """Check and load everything that does not depend on a particular layer.

        Args:
            stored: the codec as the checkpoint has it.
            spec: the same, or cut to a smaller rank.

        Raises:
            ValueError: the engine cannot serve this codec, or the checkpoint is not what was compressed.
        """
        limits.check_engine(engine, spec)
        directory = checkpoint_directory(engine)
        if compat.is_first_rank_of_machine():
            check_files(directory)
        # vLLM builds models under a default device; a codec waits on the CPU until the weights are there.
        with torch.device("cpu"):
            codecs = cut_codecs(load_codec(directory, stored), spec)
            statement = load_statement(directory)
        if statement is not None and spec != stored:
            statement = statement.without_errors()
        return cls(engine, codecs, statement)

    def attach(self, index: int, layer: compat.Layer) -> None:
        """Give a layer what its form makes of its codec, for the KV heads of this tensor-parallel rank.

        Raises:
            ValueError: the layer or the engine has a feature that the form lacks.
        """
        whole = self.codecs[index]
        assert whole is not None
        limits.check_layer(layer, whole.spec, self.engine)
        heads = self._heads(whole.spec.num_kv_heads)
        codec = whole.heads(*heads)
        members = self._members.setdefault(codec.spec.group or (index,), [])
        FORMS[codec.spec.form].serving("vllm").attach(layer, codec, self.engine, members)
        stated = None if self.statement is None else self.statement.layers[index]
        if stated is not None:
            stated = {side: of.heads(*heads) for side, of in stated.items()}
        self._note(Served(index, layer, codec, stated), codec.spec.num_kv_heads, codec.spec.head_dim)

    def bind(self, index: int) -> None:
        """The weights are there: a layer's codec goes where they are."""
        served = self.served[index]
        served.layer.impl.use_codec(served.codec, served.layer.device, self.engine.max_model_len)
        self.report()

    def note_uncompressed(self, index: int, layer: compat.Layer) -> None:
        """A layer has no codec in the checkpoint; its model class may have given it a form all the same."""
        if isinstance(layer.impl, compat.Implementation):
            config = self.engine.text_config
            start, stop = self._heads(config.num_key_value_heads)
            self._note(Served(index, layer, layer.impl.codec), stop - start, config.head_dim)
            return
        size = self._full_bytes(layer.num_kv_heads, layer.head_size)
        why = "left out by the recipe" if layer.sliding_window is None else f"sliding window of {layer.sliding_window}"
        self._layers[index] = LayerReport(size, size, why)

    def _note(self, served: Served, num_kv_heads: int, head_dim: int) -> None:
        """What a layer takes, and would take with so many KV heads of so many channels."""
        self.served[served.index] = served
        self._layers[served.index] = LayerReport(
            served.codec.spec.bytes_per_token,
            self._full_bytes(num_kv_heads, head_dim),
            request_bytes=0 if served.ring is None else served.ring.nbytes,
        )

    def report(self) -> None:
        """Tell the operator, once, what the cache takes. Call when all layers are known."""
        if not self._reported:
            self._reported = True
            rank, size = compat.tensor_parallel()
            dtype = str(self.engine.dtype).removeprefix("torch.")
            where = f" on tensor-parallel rank {rank} of {size}" if size > 1 else ""
            compat.logger.info("kvcompress: %s", describe(self._layers, dtype) + where)
            if self.engine.device.type != "cpu":
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
        capacity = compat.capacity_tokens(self.engine, cache_config)
        if canary_is_asked_for():
            canary.run(runner, self.engine, layers, self._prompt())
        else:
            compat.logger.warning("kvcompress: no start-up canary, as %s=0 asks", CANARY)
        compat.logger.info("kvcompress: %s", describe_capacity(self._layers, capacity))
        numbers = Numbers(*compat.worker_names(self.engine), *totals(self._layers), capacity)
        self.sentinel = Sentinel(layers, numbers)

    def _prompt(self) -> list[int]:
        return unstated_prompt(self.engine.vocab_size) if self.statement is None else self.statement.tokens

    def _heads(self, num_kv_heads: int) -> tuple[int, int]:
        return heads_of_rank(num_kv_heads, *compat.tensor_parallel())

    def _full_bytes(self, num_kv_heads: int, head_dim: int) -> int:
        return 2 * num_kv_heads * head_dim * self.engine.dtype.itemsize


def heads_of_rank(num_kv_heads: int, rank: int, world_size: int) -> tuple[int, int]:
    """The KV heads [start, stop) that vLLM gives one tensor-parallel rank; with fewer heads than ranks, ranks share."""
    start = rank * num_kv_heads // world_size
    return start, start + max(1, num_kv_heads // world_size)


def checkpoint_directory(engine: compat.Engine) -> Path:
    """The checkpoint's folder on this machine; a hub id is completed by the files vLLM itself does not download."""
    directory = Path(engine.model)
    if directory.is_dir():
        return directory
    import huggingface_hub

    found = huggingface_hub.snapshot_download(engine.model, revision=engine.revision, cache_dir=engine.download_dir)
    return Path(found)


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


def _attended_by(layer: compat.Layer) -> str:
    """What attends a layer on a GPU, in the report's words."""
    if not layer.impl.op.on_kernels:
        return TORCH
    return KERNELS if layer.captured else KERNELS_ALONE
