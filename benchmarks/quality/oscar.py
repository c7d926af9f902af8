"""OSCAR: rotations from what queries and attention weigh, equalised by a Hadamard matrix, 2-bit codes, exact windows.

Source: arXiv 2605.17757. Keys turn by the eigenvectors of the queries' covariance, values by those of the covariance of
values weighted by `w_t = k_t (Q^T Q) k_t`; a Hadamard matrix behind either spreads the variance. Codes are min-max
per token and group of 128 channels after clipping to the .96 (keys) and .92 (values) quantile of the magnitudes; the
first 64 and the newest 256 tokens are exact.

Simulated: all of that, per layer and KV head, queries of its group together, in groups of head_dim where that is
smaller than 128 (64 channels: 2.5 bits, where 128 take 2.25). Not simulated: the bit-reversed order of channels, which
matters only where a head has several groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .hadamard import hadamard
from .integers import group_size, min_max
from .peer import Peer, Side
from .views import Views

SINK, RECENT, GROUP = 64, 256, 128
CLIP: dict[Side, float] = {"k": 0.96, "v": 0.92}
Rotations = dict[Side, dict[int, Tensor]]
"""By side and layer: `[KV heads, head_dim, head_dim]`, orthonormal columns."""


def oscar(rotations: Rotations, bits: int = 2, sink: int = SINK, recent: int = RECENT) -> Peer:
    """OSCAR in `bits` with rotations fitted by `fit`."""

    def stored(states_BHTD: Tensor, side: Side, layer: int) -> Tensor:
        rotation_HDD = rotations[side][layer].to(states_BHTD)
        turned = states_BHTD @ rotation_HDD
        limit = turned.abs().quantile(CLIP[side], dim=-1, keepdim=True)
        coded = min_max(turned.clamp(-limit, limit), bits, group_size(turned.shape[-1], GROUP))
        return coded @ rotation_HDD.mT

    def exact(query: Tensor, token: Tensor) -> Tensor:
        return (token < sink) | (token > query - recent)

    def mean_bits(head_dim: int, length: int) -> float:
        share = min(length, sink + recent) / length
        return 16 * share + (bits + 32 / group_size(head_dim, GROUP)) * (1 - share)

    return Peer(stored, mean_bits, Views(exact, exact))


@torch.no_grad()
def fit(model: Any, sequences: Iterable[Sequence[int]]) -> Rotations:
    """Rotations from token sequences that have nothing to do with the test's."""
    queries: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}

    def collect(layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        heads, dim = key.shape[1], key.shape[3]
        of_head_HND = query[0].reshape(heads, -1, dim)
        covariance_HDD = of_head_HND.mT @ of_head_HND / of_head_HND.shape[1]
        weight_HT = torch.einsum("htd,hde,hte->ht", key[0], covariance_HDD, key[0])
        weighted = value[0] * (weight_HT / weight_HT.sum(-1, keepdim=True))[..., None]
        queries[layer] = queries.get(layer, torch.zeros(())) + covariance_HDD
        values[layer] = values.get(layer, torch.zeros(())) + weighted.mT @ value[0]

    with _shown(model, collect):
        for tokens in sequences:
            model(torch.tensor([list(tokens)], device=model.device), use_cache=False, logits_to_keep=1)
    return {"k": _equalised(queries), "v": _equalised(values)}


def _equalised(covariances: dict[int, Tensor]) -> dict[int, Tensor]:
    return {
        layer: torch.linalg.eigh(covariance.double()).eigenvectors.float() @ hadamard(covariance.shape[-1])
        for layer, covariance in covariances.items()
    }


@contextmanager
def _shown(model: Any, collect: Any) -> Iterator[None]:
    """While it lasts, every attention layer shows its queries, keys and values."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        collect(module.layer_idx, query, key, value)
        return sdpa_attention_forward(module, query, key, value, *rest, **options)

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register("benchmark_shown", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("benchmark_shown", sdpa_mask)
    model.set_attn_implementation("benchmark_shown")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
