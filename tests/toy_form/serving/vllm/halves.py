"""Form `halves` in vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcompress.codec.spec import CodecSpec
from kvcompress.serving.vllm import compat
from kvcompress.serving.vllm.metadata import HostBuilder, Step
from tests.toy_form.codec.halves.codec import HalvesCodec
from tests.toy_form.ops.halves.attention import HalvesOp, bind


def check(engine: compat.Engine, codec: CodecSpec) -> None:
    if engine.tensor_parallel_size > 8:
        raise ValueError("found --tensor-parallel-size above 8; a toy is not for machines so large")


def attach(layer: compat.Layer, codec: HalvesCodec, engine: compat.Engine, members: list[Any]) -> None:
    spec = codec.spec
    impl = HalvesImpl(layer.num_heads, layer.head_size, layer.scale, layer.num_kv_heads)
    content = 2 * 2 * spec.head_dim
    compat.attach(
        layer, HalvesBackend, impl, lambda size: compat.full_attention(size, spec.num_kv_heads, spec.head_dim, content)
    )


class HalvesImpl(compat.Implementation):
    op: HalvesOp

    def use_codec(self, codec: HalvesCodec, device: torch.device, longest: int) -> None:
        self.op = bind(codec, device)

    def run(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, step: Step, output: Tensor) -> None:
        pages_NHSXD = self._pages(kv_cache)
        self.op.append(pages_NHSXD, key, value, step.slot_mapping[: key.shape[0]])
        starts, lengths = step.query_starts.tolist(), step.seq_lens.tolist()
        self.op.attend(output, query, pages_NHSXD, step.block_table, starts, lengths, self.scale)

    def workspace_bytes(self, output: Tensor) -> int:
        return output.numel()

    def latents(self, kv_cache: Tensor, block_1: Tensor) -> Sequence[Tensor]:
        return self.op.read(self._pages(kv_cache), block_1, kv_cache.shape[2])

    def _pages(self, kv_cache: Tensor) -> Tensor:
        halves: Tensor = kv_cache.view(torch.float16)
        return halves.unflatten(-1, (2, -1))


class HalvesBackend(compat.Backend):
    name = "TOY_HALVES"
    implementation, builder = HalvesImpl, HostBuilder
