"""Rotary position embedding of keys, both ways: some latents are of keys as they were before it.

    rotated = x * cos + half_turn(x) * sin        cos, sin = amplitude * cos, sin(position * frequency)

Channels i and i + head_dim / 2 form a pair (the order of Llama, Mistral and Qwen). Types whose frequencies depend on
the length of the text so far (dynamic, longrope) have no inverse that stays true, so they are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FIXED_TYPES = ("default", "linear", "yarn", "llama3")
"""RoPE types of transformers whose frequencies are the same at every length."""


@dataclass(frozen=True)
class Rope:
    """Frequencies in radians per token `[head_dim / 2]` and the factor on cos and sin `[1]`, float32."""

    frequency_F: Tensor
    amplitude_1: Tensor

    @classmethod
    def of(cls, config: Any) -> Rope:
        """From a transformers config of one of the supported architectures, which all have Llama's rotation.

        Raises:
            ValueError: frequencies that depend on the text's length, or a rotation of a part of the channels.
        """
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        kind = config.rope_parameters["rope_type"]
        if kind not in FIXED_TYPES:
            raise ValueError(
                f"the model's RoPE is of type {kind}, whose frequencies change with the text's length, so stored keys "
                f"cannot be turned back; a codec needs one of {', '.join(FIXED_TYPES)}"
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        with torch.device("cpu"):
            rotary = LlamaRotaryEmbedding(config)
        if 2 * rotary.inv_freq.shape[0] != head_dim:
            raise ValueError(
                f"the model rotates {2 * rotary.inv_freq.shape[0]} of {head_dim} channels; latents of keys before RoPE "
                "need all of them rotated; share values only (xkv with share: v)"
            )
        amplitude_1 = torch.tensor([float(rotary.attention_scaling)], dtype=torch.float32)
        return cls(rotary.inv_freq.float(), amplitude_1)

    def rotate(self, x_THD: Tensor, positions_T: Tensor) -> Tensor:
        """Keys before RoPE to keys after it, float32."""
        cos_T1D, sin_T1D = self._tables(positions_T)
        return x_THD.float() * cos_T1D + _half_turn(x_THD.float()) * sin_T1D

    def unrotate(self, x_THD: Tensor, positions_T: Tensor) -> Tensor:
        """Keys after RoPE back to keys before it, float32."""
        cos_T1D, sin_T1D = self._tables(positions_T)
        turned = x_THD.float() * cos_T1D - _half_turn(x_THD.float()) * sin_T1D
        return turned / self.amplitude_1.square()

    def same(self, other: Rope) -> bool:
        """Whether both rotate alike, up to rounding."""
        return self.frequency_F.shape == other.frequency_F.shape and all(
            torch.allclose(mine.cpu(), theirs.cpu(), rtol=1e-5)
            for mine, theirs in ((self.frequency_F, other.frequency_F), (self.amplitude_1, other.amplitude_1))
        )

    def to(self, device: torch.device | str) -> Rope:
        return Rope(self.frequency_F.to(device), self.amplitude_1.to(device))

    def _tables(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        angle_TF = positions_T.to(self.frequency_F.device).float()[:, None] * self.frequency_F
        angle_T1D = torch.cat([angle_TF, angle_TF], dim=-1)[:, None, :]
        return angle_T1D.cos() * self.amplitude_1, angle_T1D.sin() * self.amplitude_1


def _half_turn(x_THD: Tensor) -> Tensor:
    first, second = x_THD.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
