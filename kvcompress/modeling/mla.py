"""Multi-head latent attention on top of Llama's decoder: what `transmla` makes of Llama, Mistral and Qwen2 models.

A token's cache is one vector, shared by all query heads: a latent c and a small rotary key r.

    [c | r] = W_a x                     r turned by its position
    q_i     = W_q,i x                   as in the base model, [head_dim]
    score   = [q_i K_up,j]. [c | r]     query head i of group j; the last qk_rope_head_dim channels of q_i K_up,j turned
    out_i   = V_up,j (sum_t p_t c_t)    then o_proj, as in the base model

That is attention with one KV head, whose key is [c | r] and whose value is c (the absorbed form of DeepSeek-V2, arXiv
2405.04434). It differs from that model in what a conversion after training needs: no norm on the latent, biases, the
base model's softmax scale, rotary frequencies of any choice, up-projections shared by the heads of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    eager_attention_forward,
    rotate_half,
)

PositionEmbeddings = tuple[Tensor, Tensor]
"""Cosines and sines `[batch, tokens, qk_rope_head_dim]`."""


class KVCompressMLAConfig(LlamaConfig):  # type: ignore[misc]
    """The base model's fields, and those of the latent.

    Args:
        kv_lora_rank: channels of the latent; a list has one number per layer.
        qk_rope_head_dim: channels of the rotary key.
        q_lora_rank: rank of the query projection, or None for a full one.
        rope_frequencies: radians per token of each pair of rotary channels; pair i is channels i and
            i + qk_rope_head_dim / 2.
        softmax_scale: factor of the scores.
        qkv_bias: whether query and [latent | rotary key] projections have biases.
        o_bias: whether the output projection has one.
        dropped_rope_context: tokens over which the mean rotation was taken that k_up holds in place of dropped RoPE;
            None where there is none. Running the model does not need it, undoing the conversion does.
        base_config: config.json of the converted model.
    """

    model_type = "kvcompress_mla"
    base_model_tp_plan: ClassVar[dict[str, str]] = {}

    kv_lora_rank: int | list[int] = 512
    qk_rope_head_dim: int = 64
    q_lora_rank: int | None = None
    rope_frequencies: list[float] | None = None
    softmax_scale: float = 1.0
    qkv_bias: bool = False
    o_bias: bool = False
    dropped_rope_context: int | None = None
    base_config: dict[str, Any] | None = None

    def latent_rank(self, layer: int) -> int:
        """Channels of one layer's latent."""
        return self.kv_lora_rank if isinstance(self.kv_lora_rank, int) else self.kv_lora_rank[layer]


class KVCompressMLAAttention(nn.Module):
    """Attention with one KV head: key [latent | rotary key], value the latent."""

    def __init__(self, config: KVCompressMLAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim: int = config.head_dim
        self.rank, self.rope_dim = config.latent_rank(layer_idx), config.qk_rope_head_dim
        self.num_heads: int = config.num_attention_heads
        self.num_key_value_groups = self.num_heads  # of attention's one KV head
        self.scaling = config.softmax_scale
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        hidden, groups, width = config.hidden_size, config.num_key_value_heads, self.rank + self.rope_dim
        query_dim = self.num_heads * self.head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query_dim, bias=config.qkv_bias)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=config.qkv_bias)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_dim, bias=False)
        self.kv_a_proj = nn.Linear(hidden, width, bias=config.qkv_bias)
        self.k_up = nn.Parameter(torch.empty(groups, self.head_dim, width))
        self.v_up = nn.Parameter(torch.empty(groups, self.head_dim, self.rank))
        self.o_proj = nn.Linear(query_dim, hidden, bias=config.o_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: PositionEmbeddings,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`[batch, tokens, hidden]` to the same shape, and the attention weights where the implementation has them."""
        batch, tokens = hidden_states.shape[:2]
        cos, sin = (part[:, None] for part in position_embeddings)
        if self.config.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_proj(hidden_states))
        query_BTJGD = query.view(batch, tokens, self.k_up.shape[0], -1, self.head_dim)
        absorbed_BTHC = torch.einsum("btjgd,jdc->btjgc", query_BTJGD, self.k_up.to(query.dtype)).flatten(2, 3)
        query_states = self._turn(absorbed_BTHC.transpose(1, 2), cos, sin)
        key_states = self._turn(self.kv_a_proj(hidden_states)[:, None], cos, sin)
        if past_key_values is not None:
            # The value is part of the key: an empty one keeps a token's cache at one vector.
            key_states, _ = past_key_values.update(key_states, key_states[..., :0], self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        mixed_BTHR, weights = attend(
            self,
            query_states,
            key_states,
            key_states[..., : self.rank],
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        mixed_BTJGR = mixed_BTHR.reshape(batch, tokens, self.v_up.shape[0], -1, self.rank)
        output_BTJGD = torch.einsum("btjgr,jdr->btjgd", mixed_BTJGR, self.v_up.to(query.dtype))
        return self.o_proj(output_BTJGD.flatten(2)), weights

    def _turn(self, x_BHTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn the last qk_rope_head_dim channels."""
        latent, rope = x_BHTC.split([self.rank, self.rope_dim], dim=-1)
        return torch.cat([latent, rope * cos + rotate_half(rope) * sin], dim=-1)


class KVCompressMLARotary(nn.Module):
    """Cosines and sines of the config's frequencies. It holds no buffer, which a change of dtype could round."""

    def __init__(self, config: KVCompressMLAConfig) -> None:
        super().__init__()
        self.frequencies = config.rope_frequencies

    def forward(self, x: Tensor, position_ids: Tensor) -> PositionEmbeddings:
        frequencies_F = torch.tensor(self.frequencies, dtype=torch.float32, device=x.device)
        angles_BTF = position_ids[..., None].float() * frequencies_F
        angles_BTR = torch.cat([angles_BTF, angles_BTF], dim=-1)
        return angles_BTR.cos().to(x.dtype), angles_BTR.sin().to(x.dtype)


class KVCompressMLADecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """Llama's decoder layer around latent attention."""

    def __init__(self, config: KVCompressMLAConfig, layer_idx: int) -> None:
        super(LlamaDecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = KVCompressMLAAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class KVCompressMLAPreTrainedModel(LlamaPreTrainedModel):  # type: ignore[misc]
    config: KVCompressMLAConfig
    config_class = KVCompressMLAConfig
    _no_split_modules: ClassVar[list[str]] = ["KVCompressMLADecoderLayer"]
    _supports_flash_attn = False  # its kernels want keys and values of one size
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": KVCompressMLADecoderLayer,
        "attentions": KVCompressMLAAttention,
    }

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, KVCompressMLAAttention):
            for parameter in (module.k_up, module.v_up):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class KVCompressMLAModel(KVCompressMLAPreTrainedModel, LlamaModel):  # type: ignore[misc]
    """Llama's model around latent attention."""

    def __init__(self, config: KVCompressMLAConfig) -> None:
        super(LlamaModel, self).__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [KVCompressMLADecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = KVCompressMLARotary(config)
        self.gradient_checkpointing = False
        self.post_init()


class KVCompressMLAForCausalLM(KVCompressMLAPreTrainedModel, LlamaForCausalLM):  # type: ignore[misc]
    """The language model."""

    def __init__(self, config: KVCompressMLAConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = KVCompressMLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
