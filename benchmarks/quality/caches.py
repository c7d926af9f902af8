"""transformers caches whose layers hand attention what a peer would have stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .peer import Peer


class StoredLayer(DynamicLayer):  # type: ignore[misc]
    """Every token, the newest included, is attended in its stored form."""

    def __init__(self, peer: Peer, layer: int) -> None:
        super().__init__()
        self.peer, self.layer = peer, layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(
            self.peer.stored(key_states, "k", self.layer), self.peer.stored(value_states, "v", self.layer)
        )


class ViewedLayer(DynamicLayer):  # type: ignore[misc]
    """Hands over `[stored, exact]` on the dimension of tokens, for `views.attend` to pick from."""

    def __init__(self, peer: Peer, layer: int) -> None:
        super().__init__()
        self.peer, self.layer = peer, layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        stored_k = self.peer.stored(keys, "k", self.layer)
        stored_v = self.peer.stored(values, "v", self.layer)
        return torch.cat([stored_k, keys], dim=-2), torch.cat([stored_v, values], dim=-2)


def peer_cache(peer: Peer, config: Any) -> Cache:
    """An empty cache for one sequence. Layers with a sliding window keep an ordinary one, as with our codecs."""
    made = StoredLayer if peer.views is None else ViewedLayer
    layers = DynamicCache(config=config).layers
    return Cache(
        layers=[made(peer, index) if type(layer) is DynamicLayer else layer for index, layer in enumerate(layers)]
    )
