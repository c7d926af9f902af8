"""What cache layers that are read together have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kvcompress.serving.transformers.layer import CompressedLayer


class GroupLayer(CompressedLayer):
    """Tensors besides `keys` and `values`, and operations on all of them.

    Every tensor in `extra` has the batch first and tokens, where it has any, on dimension -2.
    """

    def __init__(self, codec: Any, members: list[Any]) -> None:
        super().__init__(codec, members)
        self.extra: dict[str, Tensor] = {}

    @property
    def is_last(self) -> bool:
        return len(self.members) == len(self.codec.spec.group) and self.members[-1] is self

    def kept(self) -> list[Tensor]:
        return [self.keys, self.values, *self.extra.values()]

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
