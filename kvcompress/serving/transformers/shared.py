"""Form `shared` under transformers: layers that share a latent.

While a step runs, every layer attends the step's own tokens as they are: their latent is complete when the last layer
of the group has added its part. That layer then encodes it and gives every layer its stripe.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.codec.shared.codec import SharedCodec, SharedSide
from kvcompress.serving.transformers.groups import GroupLayer
from kvcompress.serving.transformers.records import from_records, heads_first, pack, to_records, tokens_first, unpack

SCORE_STEP = 8
"""Tokens of a step when a text is scored: a step's own tokens are not yet compressed."""


class SharedLayer(GroupLayer):
    """`keys` and `values` hold records `uint8 [batch, stripes or heads, tokens, bytes]`, gain first.

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
