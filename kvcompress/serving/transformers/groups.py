"""Caches of layers that share a latent, under generate.

While a step runs, every layer attends the step's own tokens as they are: their latent is complete when the last layer
of the group has added its part. That layer then encodes it and gives every layer its stripe.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvcompress.codec.prompt.codec import PromptCodec, factor
from kvcompress.codec.shared.codec import SharedCodec, SharedSide
from kvcompress.serving.transformers.records import (
    from_records,
    heads_first,
    pack,
    to_records,
    tokens_first,
    unpack,
)

SCORE_STEP = 8
"""Tokens of a step when a text is scored: a step's own tokens are not yet compressed."""


class GroupLayer(DynamicLayer):  # type: ignore[misc]
    """Common to both kinds: the group's layers in order, and tensors besides `keys` and `values`.

    Every tensor in `extra` has the batch first and tokens, where it has any, on dimension -2.
    """

    codec: SharedCodec | PromptCodec
    keys: Tensor
    values: Tensor
    scoring_step = 1 << 30

    def __init__(self, codec: Any, members: list[Any]) -> None:
        super().__init__()
        self.codec = codec
        self.members = members
        self.extra: dict[str, Tensor] = {}
        members.append(self)

    @property
    def is_last(self) -> bool:
        return len(self.members) == len(self.codec.spec.group) and self.members[-1] is self

    def kept(self) -> list[Tensor]:
        """Every tensor that holds cached tokens."""
        return [self.keys, self.values, *self.extra.values()]

    def scoring_prompt(self, tokens: int) -> int:
        """Tokens of the first step when a text is scored; 0 where any will do."""
        return 0

    def reset(self) -> None:
        super().reset()
        self.extra = {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda tensor: tensor[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens: a negative number of them, or all beyond a positive length."""
        length = self.get_seq_length()
        left = min(tokens_to_remove, length) if tokens_to_remove > 0 else max(0, length + tokens_to_remove)
        if left < length:
            self._crop(left, length)

    @abstractmethod
    def _crop(self, left: int, length: int) -> None:
        """Keep the first `left` of `length` tokens."""

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self.extra = {name: change(tensor) for name, tensor in self.extra.items()}


class SharedLayer(GroupLayer):
    """Form `shared`. `keys` and `values` hold records `uint8 [batch, stripes or heads, tokens, bytes]`, gain first.

    `extra` holds the tokens that are also kept as they are: `sink_k`, `sink_v`, `recent_k`, `recent_v`.
    """

    codec: SharedCodec
    scoring_step = SCORE_STEP

    def __init__(self, codec: SharedCodec, members: list[SharedLayer]) -> None:
        super().__init__(codec, members)
        self.sums: dict[str, Tensor] = {}
        """First layer of the group: the step's latents as far as they are added up, by side."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.codec = self.codec.to(self.device)
        spec, batch = self.codec.spec, key_states.shape[0]
        self.keys = torch.empty(batch, spec.k_records, 0, spec.k.bytes_per_token, dtype=torch.uint8, device=self.device)
        self.values = torch.empty(batch, 1, 0, spec.v.bytes_per_token, dtype=torch.uint8, device=self.device)
        for side, states in (("k", key_states), ("v", value_states)):
            for name, size in (("sink", spec.sink), ("recent", spec.recent)):
                if size:
                    self.extra[f"{name}_{side}"] = states[..., :0, :]
        self.is_initialized = True

    def get_seq_length(self) -> int:
        # Keys with codecs of their own are stored before the step's values are.
        return self.values.shape[-2] if self.is_initialized else 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Post-RoPE states `[batch, heads, tokens, head_dim]` of a step; returns all tokens', the step's own exact."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = {"k": key_states, "v": value_states}
        stored = self.get_seq_length()
        self._keep_exact(step)
        found = {side: self._read(side, x, stored) for side, x in step.items()}
        if self.is_last:
            self._store(key_states.shape[0])
        return found["k"], found["v"]

    def _read(self, side: str, states_BHTD: Tensor, stored: int) -> Tensor:
        shared = self.codec.shared_sides.get(side)
        if shared is None:
            self.keys = torch.cat([self.keys, to_records(self.codec.k, states_BHTD)], dim=-2)  # type: ignore[arg-type]
            whole = from_records(self.codec.k, self.keys).to(self.dtype)  # type: ignore[arg-type]
        else:
            self._add(side, shared, states_BHTD, stored)
            whole = states_BHTD.clone()
            if stored:
                whole = torch.cat([self._decode(side, shared, stored).to(self.dtype), whole], dim=-2)
        if (sink := self.extra.get(f"sink_{side}")) is not None:
            whole[..., : sink.shape[-2], :] = sink
        if (recent := self.extra.get(f"recent_{side}")) is not None:
            whole[..., whole.shape[-2] - recent.shape[-2] :, :] = recent
        return whole

    def _add(self, side: str, shared: SharedSide, states_BHTD: Tensor, stored: int) -> None:
        batch, _, tokens, _ = states_BHTD.shape
        positions_T = torch.arange(stored, stored + tokens, device=self.device).repeat(batch)
        part = shared.part(self.codec.states(side, tokens_first(states_BHTD), positions_T))
        sums = self.members[0].sums
        sums[side] = part if self is self.members[0] else sums[side] + part

    def _decode(self, side: str, shared: SharedSide, stored: int) -> Tensor:
        """Tokens of earlier steps, from the stripes of the whole group."""
        stripes = [layer.keys if side == "k" else layer.values for layer in self.members]
        batch = stripes[0].shape[0]
        latent_TR = shared.decode(unpack(shared.spec, torch.cat(stripes, dim=1)))
        positions_T = torch.arange(stored, device=self.device).repeat(batch)
        return heads_first(self.codec.read(side, latent_TR, positions_T), batch)

    def _store(self, batch: int) -> None:
        sums = self.members[0].sums
        for side, shared in self.codec.shared_sides.items():
            stripes = pack(shared.encode(sums.pop(side)), batch=batch)
            for layer, stripe in zip(self.members, stripes.split(1, dim=1), strict=True):
                name = "keys" if side == "k" else "values"
                setattr(layer, name, torch.cat([getattr(layer, name), stripe], dim=-2))

    def _keep_exact(self, step: dict[str, Tensor]) -> None:
        spec = self.codec.spec
        for side, states in step.items():
            if spec.sink:
                name = f"sink_{side}"
                self.extra[name] = torch.cat([self.extra[name], states], dim=-2)[..., : spec.sink, :].contiguous()
            if spec.recent:
                name = f"recent_{side}"
                self.extra[name] = torch.cat([self.extra[name], states], dim=-2)[..., -spec.recent :, :].contiguous()

    def _crop(self, left: int, length: int) -> None:
        self.keys, self.values = self.keys[..., :left, :], self.values[..., :left, :]
        for name, exact in self.extra.items():
            kept = left if name.startswith("sink") else max(0, exact.shape[-2] - (length - left))
            self.extra[name] = exact[..., :kept, :]


class PromptLayer(GroupLayer):
    """Form `prompt`: the first step is the prompt, and is replaced by factors when the group's last layer has seen it.

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
