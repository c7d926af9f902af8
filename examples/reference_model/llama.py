"""A plain Llama for training: same mathematics and weight names as Transformers' LlamaForCausalLM, less overhead.

Weights are kept in float32 and used in bfloat16; logits are computed at chosen positions only.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The architecture, in the field names of Transformers' LlamaConfig."""

    vocab_size: int = 1024
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    def hf_config(self) -> dict:
        """config.json for Transformers and vLLM."""
        return asdict(self) | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }


def rope_tables(shape: Shape, length: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position and channel, [length, head_dim]."""
    half = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), shape.rope_theta**-half)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves convention."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 128) -> Tensor:
    """Softmax attention of grouped queries, [rows, heads, length, head_dim] like `q`.

    Blocks of queries against the keys up to their end: on CPUs with bfloat16 products this is about twice as fast,
    backward pass included, as `scaled_dot_product_attention`, and it skips most of the masked half.
    """
    rows, heads, length, size = q.shape
    groups = k.shape[1]
    # The query heads of a group share keys: to the products they are just more rows.
    q = q.view(rows, groups, heads // groups, length, size) * size**-0.5
    mixed = []
    for start in range(0, length, block):
        end = min(length, start + block)
        queries = q[:, :, :, start:end].reshape(rows * groups, -1, size)
        scores = torch.bmm(queries, k[:, :, :end].reshape(rows * groups, end, size).mT)
        scores = scores.view(rows * groups, heads // groups, end - start, end).float()
        seen = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
        shares = torch.softmax(scores.masked_fill(~seen, -1e9), dim=-1).to(q.dtype)
        values = v[:, :, :end].reshape(rows * groups, end, size)
        part = torch.bmm(shares.view(rows * groups, -1, end), values)
        mixed.append(part.view(rows, groups, heads // groups, end - start, size))
    return torch.cat(mixed, dim=3).view(rows, heads, length, size)


class RMSNorm(nn.Module):
    """Root mean square norm of a float32 stream, handed on in the working type."""

    def __init__(self, size: int, eps: float, working: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.working = eps, working

    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(self.working)


class Linear(nn.Module):
    """A matrix kept in float32 and applied in the type of its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Causal attention with grouped queries."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = s.num_attention_heads, s.num_key_value_heads, s.head_dim
        self.q_proj = Linear(s.hidden_size, self.heads * s.head_dim)
        self.k_proj = Linear(s.hidden_size, self.kv_heads * s.head_dim)
        self.v_proj = Linear(s.hidden_size, self.kv_heads * s.head_dim)
        self.o_proj = Linear(self.heads * s.head_dim, s.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q = rotate(self.q_proj(x).view(rows, length, self.heads, self.head_dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2)
        mixed = causal_attention(q, k, v)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))


class MLP(nn.Module):
    """Gated feed-forward."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(s.hidden_size, s.intermediate_size)
        self.up_proj = Linear(s.hidden_size, s.intermediate_size)
        self.down_proj = Linear(s.intermediate_size, s.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm block on a float32 residual stream."""

    def __init__(self, s: Shape, working: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps, working)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RMSNorm(s.hidden_size, s.rms_norm_eps, working)
        self.mlp = MLP(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Decoder; `state_dict` keys, prefixed with `model.`, are those of LlamaForCausalLM with tied embeddings."""

    def __init__(self, shape: Shape, working: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.shape, self.working = shape, working
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, working) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps, working)
        # Embeddings start as large as what blocks add to the stream, or later layers could hardly tell tokens apart
        # (look-up was learned in half the steps so); the last norm brings the tied output's logits back to unit size.
        nn.init.normal_(self.embed_tokens.weight, std=1.0)
        nn.init.constant_(self.norm.weight, shape.hidden_size**-0.5)
        for layer in self.layers:
            # Blocks start as the identity: training then needs no long warm-up.
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)

    def hidden(self, ids: Tensor) -> Tensor:
        """Normalised final states, [rows, length, hidden]."""
        cos, sin = rope_tables(self.shape, ids.shape[1], ids.device)
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def logits_at(self, ids: Tensor, where: Tensor) -> Tensor:
        """Logits for the token after each position at which the boolean `where` is true, [chosen, vocabulary]."""
        return F.linear(self.hidden(ids)[where], self.embed_tokens.weight.to(self.working))
