"""vLLM's Llama around latent attention: the model class of `modeling.mla` checkpoints.

Tensor parallelism divides query heads and their groups' up-projections; the latent is the same for all heads, so every
rank makes and caches all of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.codec.latent.codec import LatentCodec
from kvcompress.codec.latent.spec import LatentSpec
from kvcompress.codec.spec import CodecSpec
from kvcompress.serving.vllm import compat, latent
from kvcompress.serving.vllm.compat.llama import LlamaWith
from kvcompress.serving.vllm.quantization import KVCompressConfig
from kvcompress.serving.vllm.startup import heads_of_rank


class LatentAttention(nn.Module):
    """`KVCompressMLAAttention` of `modeling.mla` on vLLM's layers; it says what the tensors are."""

    def __init__(
        self, config: Any, hidden_size: int, num_heads: int, quant_config: Any, cache_config: Any, prefix: str, **_: Any
    ) -> None:
        super().__init__()
        parallel_rank, parallel_size = compat.tensor_parallel()
        self.head_dim: int = config.head_dim
        self.rope_dim: int = config.qk_rope_head_dim
        self.rank: int = config.latent_rank(compat.extract_layer_index(prefix))
        self.num_heads = num_heads // parallel_size
        self.groups = heads_of_rank(config.num_key_value_heads, parallel_rank, parallel_size)
        query_dim, width = num_heads * self.head_dim, self.rank + self.rope_dim

        def column(name: str, rows: int, bias: bool) -> Any:
            return compat.ColumnParallelLinear(
                rows, query_dim, bias=bias, quant_config=quant_config, prefix=f"{prefix}.{name}"
            )

        def replicated(name: str, columns: int) -> Any:
            return compat.ReplicatedLinear(
                hidden_size, columns, bias=config.qkv_bias, quant_config=quant_config, prefix=f"{prefix}.{name}"
            )

        self.q_lora_rank: int | None = config.q_lora_rank
        if self.q_lora_rank is None:
            self.q_proj = column("q_proj", hidden_size, config.qkv_bias)
        else:
            self.q_a_proj = replicated("q_a_proj", self.q_lora_rank)
            self.q_b_proj = column("q_b_proj", self.q_lora_rank, False)
        self.kv_a_proj = replicated("kv_a_proj", width)
        self.k_up = self._up_projection(width)
        self.v_up = self._up_projection(self.rank)
        self.o_proj = compat.RowParallelLinear(
            query_dim, hidden_size, bias=config.o_bias, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        frequencies_F = torch.tensor(config.rope_frequencies, dtype=torch.float32)
        self.register_buffer("frequencies_F", frequencies_F, persistent=False)
        self.frequencies_F: Tensor
        engine = compat.current_engine()
        codec = LatentCodec(LatentSpec(width, self.rank, engine.dtype.itemsize))
        latent.check(engine, CodecSpec((codec.spec,)))
        self.attn = compat.Attention(
            self.num_heads,
            width,
            config.softmax_scale,
            num_kv_heads=1,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            attn_backend=latent.backend_for(codec, engine),
            head_size_v=self.rank,
            codec=codec,
            engine=engine,
        )

    def _up_projection(self, columns: int) -> nn.Parameter:
        start, stop = self.groups
        parameter = nn.Parameter(torch.empty(stop - start, self.head_dim, columns), requires_grad=False)
        # The loader finds this attribute, as on vLLM's own parameters.
        parameter.weight_loader = lambda own, loaded: own.data.copy_(loaded[start:stop])  # type: ignore[attr-defined]
        return parameter

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """`[tokens, hidden]` to the same shape."""
        cos, sin = rotary(positions, self.frequencies_F, hidden_states.dtype)
        if self.q_lora_rank is None:
            query, _ = self.q_proj(hidden_states)
        else:
            query, _ = self.q_b_proj(self.q_a_proj(hidden_states)[0])
        query_TJGD = query.unflatten(-1, (self.k_up.shape[0], -1, self.head_dim))
        absorbed_THC = torch.einsum("tjgd,jdc->tjgc", query_TJGD, self.k_up).flatten(1, 2)
        key_TC, _ = self.kv_a_proj(hidden_states)
        key_T1C = self._turn(key_TC[:, None], cos, sin)
        value_T1R = key_T1C[..., : self.rank].contiguous()
        mixed = self.attn(self._turn(absorbed_THC, cos, sin), key_T1C, value_T1R)
        mixed_TJGR = mixed.unflatten(-1, (self.v_up.shape[0], -1, self.rank))
        output_TJGD = torch.einsum("tjgr,jdr->tjgd", mixed_TJGR, self.v_up)
        output: Tensor = self.o_proj(output_TJGD.flatten(1))[0]
        return output

    def _turn(self, x_THC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn the last qk_rope_head_dim channels."""
        latent, rope = x_THC.split([self.rank, self.rope_dim], dim=-1)
        real, imaginary = rope.chunk(2, dim=-1)
        return torch.cat([latent, rope * cos + torch.cat([-imaginary, real], dim=-1) * sin], dim=-1)


def rotary(positions_T: Tensor, frequencies_F: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[tokens, 1, 2 F]` of the rotary key's angles, as `modeling.mla` computes them."""
    angles_TF = positions_T[:, None].float() * frequencies_F
    angles = torch.cat([angles_TF, angles_TF], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


class KVCompressMLAForCausalLM(LlamaWith):
    """The language model, by the name that config.json has for it."""

    attention = LatentAttention

    def loaded(self, quant_config: Any) -> None:
        if isinstance(quant_config, KVCompressConfig):
            quant_config.report()
