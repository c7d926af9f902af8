"""Factors of one prompt's cache, shared by a group of layers: the basis is the prompt's own.

    [x_1 | ... | x_W] = U S V^T      common = U_r [tokens, rank]      own_l = (S V^T)_r of layer l [rank, channels]

x_l are layer l's values, or keys before RoPE, all KV heads side by side, not centred. The reconstruction is the best
one of its rank for this prompt. Nothing of it can be in a checkpoint or in pages that requests share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.codec.contract import ReadTensor
from kvcompress.codec.prompt.spec import PromptSpec
from kvcompress.codec.rope import Rope


def factor(states_TX: Sequence[Tensor], rank: int) -> tuple[Tensor, list[Tensor]]:
    """The truncated SVD of several layers' states side by side.

    Args:
        states_TX: per layer `[..., tokens, channels]`, the same tokens.
        rank: kept; fewer where the matrix has fewer.

    Returns:
        common `[..., tokens, rank]`, and per layer own `[..., rank, channels]`, float32.
    """
    joined = torch.cat([states.float() for states in states_TX], dim=-1)
    left, singular, right = torch.linalg.svd(joined, full_matrices=False)
    rank = min(rank, singular.shape[-1])
    weighted = singular[..., :rank, None] * right[..., :rank, :]
    widths = [states.shape[-1] for states in states_TX]
    return left[..., :rank].contiguous(), [own.contiguous() for own in weighted.split(widths, dim=-1)]


@dataclass(frozen=True)
class PromptCodec:
    """One layer of a group whose cache is factored prompt by prompt."""

    spec: PromptSpec
    rope: Rope | None
    """The rotation of keys, where keys are shared."""

    def states(self, side: str, x_THD: Tensor, positions_T: Tensor) -> Tensor:
        """Post-RoPE keys ("k") or values ("v") as the states that are factored `[tokens, channels]`, float32."""
        x_THD = self.rope.unrotate(x_THD, positions_T) if side == "k" and self.rope else x_THD.float()
        return x_THD.flatten(1)

    def read(self, side: str, states_TX: Tensor, positions_T: Tensor) -> Tensor:
        """Inverse of `states`: `[tokens, heads, head_dim]`."""
        x_THD: Tensor = states_TX.unflatten(-1, (self.spec.num_kv_heads, self.spec.head_dim))
        return self.rope.rotate(x_THD, positions_T) if side == "k" and self.rope else x_THD

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of the group's factors, by side; sides that are not shared are missing."""
        layers = len(self.spec.group)
        ranks = {"k": layers * self.spec.k_rank, "v": layers * self.spec.v_rank}
        return {side: rank for side, rank in ranks.items() if rank}

    @staticmethod
    def round_trip(
        codecs: Sequence[PromptCodec], keys_THD: Sequence[Tensor], values_THD: Sequence[Tensor], positions_T: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """The sequence is taken for the prompt; its sink and recent tokens stay as they are."""
        read: dict[str, list[Tensor]] = {"k": [x.float() for x in keys_THD], "v": [x.float() for x in values_THD]}
        spec = codecs[0].spec
        inner = slice(spec.sink, max(spec.sink, len(positions_T) - spec.recent))
        for side, rank in codecs[0].ranks.items():
            states = [
                codec.states(side, x_THD[inner], positions_T[inner])
                for codec, x_THD in zip(codecs, read[side], strict=True)
            ]
            common_TR, own = factor(states, rank)
            for place, codec in enumerate(codecs):
                whole = read[side][place].clone()
                whole[inner] = codec.read(side, common_TR @ own[place], positions_T[inner])
                read[side][place] = whole
        return list(zip(read["k"], read["v"], strict=True))

    def as_stored(self, side: str, query_Q1: Tensor, token_1T: Tensor, start: int) -> Tensor:
        """Tokens of a prompt that has been factored, which is all that came before the step."""
        return token_1T < start if side in self.ranks else torch.zeros_like(token_1T, dtype=torch.bool)

    def silent(self) -> list[Tensor]:
        """None: there is no basis that could stand for nothing."""
        return [torch.zeros((), dtype=torch.bool)] * 2

    def tensors(self) -> dict[str, Tensor]:
        if self.rope is None:
            return {}
        return {"rope.frequency": self.rope.frequency_F, "rope.amplitude": self.rope.amplitude_1}

    @classmethod
    def from_tensors(cls, spec: PromptSpec, read: ReadTensor) -> PromptCodec:
        if spec.share == "v":
            return cls(spec, None)
        frequency_F = read("rope.frequency", (spec.head_dim // 2,), positive=True)
        return cls(spec, Rope(frequency_F, read("rope.amplitude", (1,), positive=True)))

    def to(self, device: torch.device | str) -> PromptCodec:
        return PromptCodec(self.spec, None if self.rope is None else self.rope.to(device))

    def heads(self, start: int, stop: int) -> PromptCodec:
        """All heads or none, as in `SharedCodec`.

        Raises:
            ValueError: only some of the heads are asked for.
        """
        if (start, stop) != (0, self.spec.num_kv_heads):
            raise ValueError(
                f"factors of a prompt are of all {self.spec.num_kv_heads} KV heads and cannot be divided among ranks"
            )
        return self
