"""Form `halves` under transformers."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.serving.transformers.layer import CompressedLayer
from tests.toy_form.codec.halves.codec import HalvesCodec


class HalvesLayer(CompressedLayer):
    """`keys` and `values` are halves `[batch, KV heads, tokens, head_dim]`."""

    codec: HalvesCodec

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :].half(), value_states[..., :0, :].half()
        self.keys = torch.cat([self.keys, self.codec.encode(key_states)], dim=-2)
        self.values = torch.cat([self.values, self.codec.encode(value_states)], dim=-2)
        keys, values = self.codec.decode(self.keys), self.codec.decode(self.values)
        return keys.to(key_states.dtype), values.to(value_states.dtype)
