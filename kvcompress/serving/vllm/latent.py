"""The attention backend of multi-head latent attention: every token's [latent | rotary key] stored once, per layer.

To vLLM it is attention with one KV head whose values take no room: they are the first channels of the keys.

Pages are the same everywhere; where the CUDA kernels attend, a step's numbers stay on the device, as in
`device_backend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvcompress.codec.latent.codec import LatentCodec
from kvcompress.codec.latent.spec import LatentSpec
from kvcompress.ops.latent.attention import bind
from kvcompress.ops.latent.reference import LatentOp
from kvcompress.serving.vllm import compat
from kvcompress.serving.vllm.backend import (
    CompressedAttentionBackend,
    CompressedAttentionImpl,
    CompressedMetadata,
    CompressedMetadataBuilder,
    Part,
)
from kvcompress.serving.vllm.device_backend import DeviceMetadataBuilder


def backend_for(codec: LatentCodec, dtype: torch.dtype, config: compat.VllmConfig) -> type[LatentAttentionBackend]:
    """The backend of a layer with such latents."""
    return DeviceLatentBackend if bind(codec, compat.device(config), dtype).on_kernels else LatentAttentionBackend


class LatentAttentionBackend(CompressedAttentionBackend):
    """Names the parts; blocks, layouts and metadata are those of the compressed cache."""

    @staticmethod
    def get_name() -> str:
        return compat.LATENT_BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return LatentAttentionImpl

    @classmethod
    def customize_spec(cls, spec: compat.AttentionSpec) -> compat.AttentionSpec:
        return replace(spec, head_size_v=0, max_tp_shards=1)


class DeviceLatentBackend(LatentAttentionBackend):
    """Names the parts where the CUDA kernels attend. Pages are alike, but engines are told apart by names."""

    @staticmethod
    def get_name() -> str:
        return compat.DEVICE_LATENT_BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return DeviceLatentImpl

    @staticmethod
    def get_builder_cls() -> type[CompressedMetadataBuilder]:
        return DeviceMetadataBuilder


class LatentAttentionImpl(CompressedAttentionImpl):
    """Attention of one layer, which needs no codec."""

    _op: LatentOp | None
    on_kernels = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.kv_cache_dtype != "auto":
            raise ValueError(
                f"found --kv-cache-dtype {self.kv_cache_dtype}; the latent is cached in the model's dtype; leave it at "
                "auto"
            )
        assert self.num_kv_heads == 1

    def _bound(self, rank: int, device: torch.device, dtype: torch.dtype) -> LatentOp:
        if self._op is None:
            self._op = bind(LatentCodec(LatentSpec(self.head_size, rank, dtype.itemsize)), device, dtype)
        return self._op

    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, batch: CompressedMetadata, output: Tensor
    ) -> None:
        """Store this step's keys, then attend.

        Args:
            query: absorbed, `[tokens, heads, channels]`; may be padded at the end.
            key: `[tokens, 1, channels]`. The value is its start, and is not looked at.
            kv_cache: `[blocks, 1, tokens per block, channels]`, blocks possibly strided.
            output: `[tokens, heads, latent channels]`, written in place.
        """
        pages_NSC = kv_cache[:, 0]
        assert pages_NSC.shape[2] == self.head_size, "the cache must hold the latent once"
        op = self._bound(output.shape[2], kv_cache.device, kv_cache.dtype)
        op.append(pages_NSC, key[:, 0], batch.slot_mapping[: key.shape[0]])
        for part in batch.parts:
            op.attend(
                output[part.tokens],
                query[part.tokens],
                pages_NSC,
                batch.block_table[part.requests],
                *self._numbers(batch, part),
                self.scale,
                max_query_len=part.max_query_len,
            )

    def _numbers(self, batch: CompressedMetadata, part: Part) -> tuple[Tensor | Sequence[int], Tensor | Sequence[int]]:
        """Where the part's queries start, and its requests' lengths."""
        return part.query_starts, part.seq_lens


class DeviceLatentImpl(LatentAttentionImpl):
    """Attention of one layer by the CUDA kernels."""

    on_kernels = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._longest = int(compat.get_current_vllm_config().model_config.max_model_len)

    def _numbers(self, batch: CompressedMetadata, part: Part) -> tuple[Tensor | Sequence[int], Tensor | Sequence[int]]:
        if isinstance(part.query_starts, Tensor):
            return part.query_starts, part.seq_lens
        # A prompt's are on the host, for forms that decode its pages; here kernels attend it, too.
        requests = part.requests
        starts_R = batch.query_starts[requests.start : requests.stop + 1] - part.tokens.start
        return starts_R, batch.seq_lens[requests]

    def _workspace(self, output: Tensor) -> int:
        tokens, heads, rank = output.shape
        return self._bound(rank, output.device, output.dtype).workspace_bytes(tokens, heads, rank, self._longest)


def rotary(positions_T: Tensor, frequencies_F: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[tokens, 1, 2 F]` of the rotary key's angles, as `modeling.mla` computes them."""
    angles_TF = positions_T[:, None].float() * frequencies_F
    angles = torch.cat([angles_TF, angles_TF], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)
