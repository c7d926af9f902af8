"""What the cache layers of all forms have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer


class CompressedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's cache.

    Args:
        codec: the layer's.
        members: the layers before it that its cache is read together with, in order; it joins them.
    """

    codec: Any
    keys: Tensor
    values: Tensor
    scoring_step = 1 << 30
    """Tokens of a step, at most, when a text is scored."""

    def __init__(self, codec: Any, members: list[Any]) -> None:
        super().__init__()
        self.codec = codec
        self.members = members
        members.append(self)

    def kept(self) -> list[Tensor]:
        """Every tensor that holds cached tokens, once there are any."""
        return [self.keys, self.values]

    def scoring_prompt(self, tokens: int) -> int:
        """Tokens of the first step when a text is scored; 0 where any will do."""
        return 0

    def prepare(self, model: PreTrainedModel) -> None:
        """Let a model attend this cache, where that takes more than keys and values."""
