"""Form `prompt` under transformers: a prompt is factored when the group's last layer has seen it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.codec.prompt.codec import PromptCodec, factor
from kvcompress.serving.transformers.groups import GroupLayer
from kvcompress.serving.transformers.records import heads_first, tokens_first


class PromptLayer(GroupLayer):
    """The first step is the prompt, and is replaced by factors.

    `keys` and `values` hold what is not factored: the prompt's newest tokens where asked, and every generated one.
    `extra` holds, by side, `sink`, `common` (the same tensor in all layers of the group) and `own`.
    """

    codec: PromptCodec

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.codec = self.codec.to(self.device)

    def get_seq_length(self) -> int:
        if not self.is_initialized:
            return 0
        return int(self.values.shape[-2] + self._before("v"))

    def scoring_prompt(self, tokens: int) -> int:
        return tokens // 2

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Post-RoPE states `[batch, heads, tokens, head_dim]` of a step; returns all tokens'."""
        first = not self.is_initialized
        keys, values = super().update(key_states, value_states)
        if first:
            if self.is_last:
                self._factor()
            return keys, values
        return self._read("k", keys), self._read("v", values)

    def _before(self, side: str) -> int:
        """Tokens of a side that come before those in `keys` and `values`."""
        names = (f"sink_{side}", f"common_{side}")
        return sum(self.extra[name].shape[-2] for name in names if name in self.extra)

    def _factor(self) -> None:
        spec, length = self.codec.spec, self.keys.shape[-2]
        inner = slice(spec.sink, length - spec.recent)
        if inner.stop <= inner.start:
            return
        batch = self.keys.shape[0]
        positions_T = torch.arange(inner.start, inner.stop, device=self.device).repeat(batch)
        for side, rank in self.codec.ranks.items():
            name = "keys" if side == "k" else "values"
            wholes = [getattr(layer, name) for layer in self.members]
            states = [
                layer.codec.states(side, tokens_first(whole[..., inner, :]), positions_T).unflatten(0, (batch, -1))
                for layer, whole in zip(self.members, wholes, strict=True)
            ]
            common, own = factor(states, rank)
            common = common.to(self.dtype)
            for layer, whole, factor_RX in zip(self.members, wholes, own, strict=True):
                layer.extra |= {f"common_{side}": common, f"own_{side}": factor_RX.to(self.dtype)}
                if spec.sink:
                    layer.extra[f"sink_{side}"] = whole[..., : inner.start, :].clone()
                setattr(layer, name, whole[..., inner.stop :, :].clone())

    def _read(self, side: str, rest_BHTD: Tensor) -> Tensor:
        """All tokens of a side, given those that are not factored."""
        common_BTR = self.extra.get(f"common_{side}")
        if common_BTR is None:
            return rest_BHTD
        sink = self.extra.get(f"sink_{side}", rest_BHTD[..., :0, :])
        batch, tokens = common_BTR.shape[:2]
        states_TX = (common_BTR.float() @ self.extra[f"own_{side}"].float()).flatten(0, 1)
        positions_T = torch.arange(sink.shape[-2], sink.shape[-2] + tokens, device=self.device).repeat(batch)
        inner = heads_first(self.codec.read(side, states_TX, positions_T), batch)
        return torch.cat([sink, inner.to(self.dtype), rest_BHTD], dim=-2)

    def _crop(self, left: int, length: int) -> None:
        for side, name in (("k", "keys"), ("v", "values")):
            rest = getattr(self, name)
            setattr(self, name, rest[..., : max(0, left - self._before(side)), :])
            for part in (f"sink_{side}", f"common_{side}"):
                if part in self.extra:
                    start = 0 if part.startswith("sink") else self.extra.get(f"sink_{side}", rest[..., :0, :]).shape[-2]
                    self.extra[part] = self.extra[part][..., : max(0, left - start), :]
