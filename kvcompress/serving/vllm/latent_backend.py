"""The attention backend of multi-head latent attention: every token's [latent | rotary key] stored once, per layer.

To vLLM it is attention with one KV head whose values take no room: they are the first channels of the keys.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvcompress.ops import latent
from kvcompress.serving.vllm import compat
from kvcompress.serving.vllm.backend import (
    CompressedAttentionBackend,
    CompressedAttentionImpl,
    CompressedMetadata,
)


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


class LatentAttentionImpl(CompressedAttentionImpl):
    """Attention of one layer, which needs no codec."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.kv_cache_dtype != "auto":
            raise ValueError(
                f"found --kv-cache-dtype {self.kv_cache_dtype}; the latent is cached in the model's dtype; leave it at "
                "auto"
            )
        assert self.num_kv_heads == 1

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
        latent.append(pages_NSC, key[:, 0], batch.slot_mapping[: key.shape[0]])
        latent.attend(
            output,
            query,
            pages_NSC,
            batch.block_table,
            batch.query_starts,
            batch.seq_lens,
            self.scale,
        )


def rotary(positions_T: Tensor, frequencies_F: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[tokens, 1, 2 F]` of the rotary key's angles, as `modeling.mla` computes them."""
    angles_TF = positions_T[:, None].float() * frequencies_F
    angles = torch.cat([angles_TF, angles_TF], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)
