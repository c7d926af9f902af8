"""Form `latent` in vLLM: every token's [latent | rotary key] stored once, per layer, as `model` computes it.

To vLLM it is attention with one KV head whose values take no room: they are the first channels of the keys.

Pages are the same everywhere; where the CUDA kernels attend, a step's numbers stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from kvcompress.codec.latent.codec import LatentCodec
from kvcompress.codec.spec import CodecSpec
from kvcompress.ops.latent.attention import bind
from kvcompress.serving.vllm import compat
from kvcompress.serving.vllm.metadata import DeviceBuilder, HostBuilder, Part, Step


def check(engine: compat.Engine, codec: CodecSpec) -> None:
    """Refuse engine options that a latent lacks.

    Raises:
        ValueError: naming the option.
    """
    if engine.cache_dtype != "auto":
        raise ValueError(
            f"found --kv-cache-dtype {engine.cache_dtype}; the latent is cached in the model's dtype; leave it at auto"
        )


def attach(layer: compat.Layer, codec: LatentCodec, engine: compat.Engine, members: list[Any]) -> None:
    """Raises ValueError: only its model class can give a layer this form."""
    raise ValueError(f"{layer.name} computes no latent that could be cached; was config.json edited?")


def backend_for(codec: LatentCodec, engine: compat.Engine) -> type[LatentBackend]:
    """The backend of a layer with such latents."""
    return DeviceLatentBackend if bind(codec, engine.device, engine.dtype).on_kernels else LatentBackend


class LatentImpl(compat.Implementation):
    """Attention of one layer; the model class hands it its codec."""

    def __init__(self, *sizes: Any, codec: LatentCodec, engine: compat.Engine) -> None:
        super().__init__(*sizes)
        assert (self.num_kv_heads, self.head_size) == (1, codec.spec.head_dim)
        self.codec, self._longest = codec, engine.max_model_len
        self.op = bind(codec, engine.device, engine.dtype)

    def run(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, step: Step, output: Tensor) -> None:
        """Store this step's keys, then attend.

        Args:
            query: absorbed, `[tokens, heads, channels]`; may be padded at the end.
            key: `[tokens, 1, channels]`. The value is its start, and is not looked at.
            kv_cache: `[blocks, 1, tokens per block, channels]`, blocks possibly strided.
            output: `[tokens, heads, latent channels]`, written in place.
        """
        pages_NSC = kv_cache[:, 0]
        assert pages_NSC.shape[2] == self.head_size, "the cache must hold the latent once"
        self.op.append(pages_NSC, key[:, 0], step.slot_mapping[: key.shape[0]])
        for part in step.parts:
            self.op.attend(_on_device(step, part).call(step, query, output, self.scale), pages_NSC)

    def workspace_bytes(self, output: Tensor) -> int:
        tokens, heads, rank = output.shape
        return self.op.workspace_bytes(tokens, heads, rank, self._longest)

    def latents(self, kv_cache: Tensor, block_1: Tensor) -> Sequence[Tensor]:
        return [kv_cache[block_1][0, 0].float()]


def _on_device(step: Step, part: Part) -> Part:
    """The part, its numbers where kernels read them. A prompt's are on the host, for forms that decode its pages."""
    if isinstance(part.query_starts, Tensor):
        return part
    requests = part.requests
    starts_R = step.query_starts[requests.start : requests.stop + 1] - part.tokens.start
    return replace(part, query_starts=starts_R, seq_lens=step.seq_lens[requests])


class LatentBackend(compat.Backend):
    name = "KVCOMPRESS_LATENT"
    implementation, builder = LatentImpl, HostBuilder
    values_in_keys = True


class DeviceLatentBackend(LatentBackend):
    name = "KVCOMPRESS_LATENT_CUDA"
    builder = DeviceBuilder
