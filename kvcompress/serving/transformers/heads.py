"""Form `heads` under transformers."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.codec.heads.codec import HeadsCodec
from kvcompress.serving.transformers.layer import CompressedLayer
from kvcompress.serving.transformers.records import from_records, to_records


class HeadsLayer(CompressedLayer):
    """`keys` and `values` hold records `uint8 [batch, heads, tokens, bytes]`, codes last.

    Tokens stay on dimension -2, so cropping, beam reordering and batch selection are the dynamic layer's own. Every
    token, the newest included, is attended in its stored form: results do not depend on how a prompt is cut up.
    """

    codec: HeadsCodec

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.codec = self.codec.to(self.device)
        batch, heads = key_states.shape[:2]
        self.keys, self.values = (
            torch.empty(batch, heads, 0, side.spec.bytes_per_token, dtype=torch.uint8, device=self.device)
            for side in (self.codec.k, self.codec.v)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append post-RoPE states `[batch, heads, tokens, head_dim]`; return every token's decoded states."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, to_records(self.codec.k, key_states)], dim=-2)
        self.values = torch.cat([self.values, to_records(self.codec.v, value_states)], dim=-2)
        keys, values = from_records(self.codec.k, self.keys), from_records(self.codec.v, self.values)
        return keys.to(self.dtype), values.to(self.dtype)
