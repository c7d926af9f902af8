"""What has to be known of a model family: the names of its parts, and what its class in transformers makes of a config.

A family that follows the usual names says only what its config.json means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Names:
    """Modules of the model in transformers; tensors of a checkpoint are named after them."""

    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"
    # Inside a decoder layer:
    attention: str = "self_attn"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    # Inside its attention:
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"

    def layer(self, index: int | str) -> str:
        """Prefix of a decoder layer's tensors, with its dot."""
        return f"{self.layers}.{index}."

    @property
    def attention_linears(self) -> tuple[str, str, str, str]:
        """Projections of queries, keys, values and outputs, inside a decoder layer."""
        q, k, v, o = (f"{self.attention}.{name}" for name in (self.q, self.k, self.v, self.o))
        return q, k, v, o

    @property
    def linears(self) -> dict[str, str]:
        """Linear layers of a decoder layer, by what recipes call them, in the order in which they run."""
        return dict(zip(LINEARS, (*self.attention_linears, self.gate, self.up, self.down), strict=True))


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What recipes call the linear layers of a decoder layer, whatever a family calls them."""


@dataclass(frozen=True)
class Experts:
    """MLPs of which a router picks a few per token. Names are inside a decoder layer, `*` is an expert's number."""

    count: tuple[str, ...]
    """Keys of config.json that may have the number of experts; the next three are keys, too."""
    size: str
    """Inner size of an expert."""
    step: str | None = None
    """Every so many-th layer has experts."""
    dense: str | None = None
    """List of layers that have none all the same."""
    router: str = "mlp.gate"
    gate: str = "mlp.experts.*.gate_proj"
    up: str = "mlp.experts.*.up_proj"
    down: str = "mlp.experts.*.down_proj"
    gate_up_stack: str = "mlp.experts.gate_up_proj"
    """Parameter of transformers' module that stacks gate and up of all experts, `[experts, 2 * size, hidden]`."""
    down_stack: str = "mlp.experts.down_proj"
    """`[experts, hidden, size]`."""

    @property
    def stacks(self) -> dict[str, tuple[str, ...]]:
        """Tensors of a checkpoint that each stacked parameter is made of: joined by outputs, then stacked by expert."""
        gate, up, down = (f"{name}.weight" for name in (self.gate, self.up, self.down))
        return {self.gate_up_stack: (gate, up), self.down_stack: (down,)}


COMMON: Mapping[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "tie_word_embeddings": False,
}
"""Defaults that the classes of all families share."""

Windows = Literal["by_layer", "in_all", "opt_in", "dropped", "as_named"]
"""Layers that attend a sliding window:

    by_layer   none in transformers; in vLLM those that layer_types names, which keep their cache
    in_all     all
    opt_in     with use_sliding_window those from max_window_layers on, or those that layer_types names
    dropped    none, whatever config.json says
    as_named   those that layer_types names; all where there is only a window: for families that we know nothing of
"""


@dataclass(frozen=True)
class Family:
    """One model class of transformers."""

    architecture: str
    model_type: str | None
    """None: not known, so any."""
    defaults: Mapping[str, Any]
    """Of the keys that may be left out: transformers and vLLM take them from the configuration class, so they are part
    of a model; a plan must not wait for that class to be imported."""
    nullable: frozenset[str] = frozenset()
    """Keys that may be null, besides those that may be null in every family."""
    unread: frozenset[str] = frozenset()
    """Keys that vLLM reads and transformers does not."""
    neutral: Mapping[str, Any] = field(default_factory=dict)
    """Keys that vLLM's class reads and transformers' does not, and where they change nothing."""
    text_config: str | None = None
    """Key under which a model of several kinds of input keeps the decoder's config."""
    windows: Windows = "as_named"
    activation: str | None = "silu"
    """The only hidden_act that vLLM's class has; None: not known."""
    whole_heads: bool = False
    """hidden_size must be a multiple of the query heads, whatever head_dim is."""
    qkv_bias: bool | None = False
    """Of the query, key and value projections; None: where `attention_bias` says so."""
    o_bias: bool | None = False
    partial_rotary: bool = False
    """partial_rotary_factor means to transformers and vLLM the same: the leading channels of each head are rotated."""
    qk_norm: Literal["head", "all"] | None = None
    """Queries and keys are normalised before RoPE: each head for itself, or all heads as one vector."""
    embedding_scale: str | None = None
    """Key of the factor on embeddings, or "sqrt(hidden_size)"."""
    logits_divisor: str | None = None
    """Key of what logits are divided by."""
    experts: Experts | None = None
    names: Names = Names()
    tried: bool = False
    """Nothing is known of this family: it is taken to be an ordinary one."""

    def stored(self, name: str) -> tuple[str, ...]:
        """Tensors of a checkpoint that a parameter of transformers' model is made of, `*` for an expert's number."""
        for stack, parts in (self.experts.stacks if self.experts else {}).items():
            if name.endswith(stack):
                return tuple(name.removesuffix(stack) + part for part in parts)
        return (name,)

    @property
    def like_llama(self) -> bool:
        """Keys and values are linear in a layer's normalised input, and all else is Llama's: as `transmla` needs."""
        return not (self.tried or self.qk_norm or self.embedding_scale or self.experts) and self.names == Names()
