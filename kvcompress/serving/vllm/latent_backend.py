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
from kvcompress.serving.vllm.backend import CompressedAttentionBackend, CompressedMetadata


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


class LatentAttentionImpl(compat.AttentionImpl):  # type: ignore[misc]
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = compat.AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        if kv_cache_dtype != "auto":
            raise ValueError(
                f"found --kv-cache-dtype {kv_cache_dtype}; the latent is cached in the model's dtype; leave it at auto"
            )
        # The model class asks for none of these.
        assert num_kv_heads == 1
        assert alibi_slopes is None
        assert sliding_window is None
        assert not logits_soft_cap
        assert attn_type == compat.AttentionType.DECODER
        assert kv_sharing_target_layer_name is None
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads, kv_cache_dtype

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CompressedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store this step's keys, then attend.

        Args:
            query: absorbed, `[tokens, heads, channels]`; may be padded at the end.
            key: `[tokens, 1, channels]`. The value is its start, and is not looked at.
            kv_cache: `[blocks, 1, tokens per block, channels]`, blocks possibly strided.
            attn_metadata: None in profiling and warm-up runs.
            output: `[tokens, heads, latent channels]`, written in place.
        """
        assert output_scale is None, "vLLM asks before it fuses output quantization"
        assert output_block_scale is None
        if attn_metadata is None:
            return output.fill_(0)
        batch, pages_NSC = attn_metadata, kv_cache[:, 0]
        assert pages_NSC.shape[2] == self.head_size, "the cache must hold the latent once"
        tokens = batch.num_actual_tokens
        latent.append(pages_NSC, key[:tokens, 0], batch.slot_mapping[:tokens])
        latent.attend(
            output,
            query,
            pages_NSC,
            batch.block_table,
            batch.query_starts.tolist(),
            batch.seq_lens.tolist(),
            self.scale,
        )
        return output


def rotary(positions_T: Tensor, frequencies_F: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[tokens, 1, 2 F]` of the rotary key's angles, as `modeling.mla` computes them."""
    angles_TF = positions_T[:, None].float() * frequencies_F
    angles = torch.cat([angles_TF, angles_TF], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)
