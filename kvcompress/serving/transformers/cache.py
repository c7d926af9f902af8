"""A transformers cache that stores compressed bytes and hands attention the decoded keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvcompress.checkpoint.source import resolve
from kvcompress.codec.forms import CacheCodec
from kvcompress.codec.layer import LayerCodec, SideCodec
from kvcompress.codec.spec import GAIN_BYTES
from kvcompress.serving.loading import load_codec


class CompressedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's cache. `keys` and `values` hold records `uint8 [batch, heads, tokens, bytes]`, gain first.

    Tokens stay on dimension -2, so cropping, beam reordering and batch selection are the dynamic layer's own. Every
    token, the newest included, is attended in its stored form: results do not depend on how a prompt is cut up.
    """

    def __init__(self, codec: LayerCodec) -> None:
        super().__init__()
        self.codec = codec

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.codec = self.codec.to(self.device)
        batch, heads = key_states.shape[:2]
        self.keys, self.values = (
            torch.empty(batch, heads, 0, side.spec.bytes_per_token, dtype=torch.uint8, device=self.device)
            for side in (self.codec.k, self.codec.v)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append post-RoPE states `[batch, heads, tokens, head_dim]`; return every token's decoded states."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, _to_records(self.codec.k, key_states)], dim=-2)
        self.values = torch.cat([self.values, _to_records(self.codec.v, value_states)], dim=-2)
        keys, values = _from_records(self.codec.k, self.keys), _from_records(self.codec.v, self.values)
        return keys.to(self.dtype), values.to(self.dtype)


class CompressedCache(Cache):  # type: ignore[misc]
    """A whole model's cache: compressed layers where the checkpoint has a codec, ordinary ones elsewhere."""

    def __init__(self, codecs: Sequence[CacheCodec | None]) -> None:
        super().__init__(layers=[_layer(codec) for codec in codecs])

    @classmethod
    def from_pretrained(cls, model: str | Path, kv_rank: float = 1.0) -> CompressedCache:
        """An empty cache for a compressed checkpoint (a folder or a hub id).

        Args:
            kv_rank: share of the stored channels to keep; less memory, more loss.

        Raises:
            ValueError: not a compressed checkpoint, a damaged one, or one that cannot be cut.
        """
        return cls(load_codec(resolve(str(model)), kv_rank=kv_rank))

    @property
    def nbytes(self) -> int:
        """Bytes the cached tokens take now."""
        return sum(t.nbytes for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values))


def _layer(codec: CacheCodec | None) -> DynamicLayer:
    if codec is None:
        return DynamicLayer()
    assert isinstance(codec, LayerCodec), f"no transformers cache for form {codec.spec.form}"
    return CompressedLayer(codec)


def _to_records(side: SideCodec, states_BHTD: Tensor) -> Tensor:
    batch, heads, tokens, head_dim = states_BHTD.shape
    gain, codes = side.encode(states_BHTD.transpose(1, 2).reshape(batch * tokens, heads, head_dim))
    record = codes if gain is None else torch.cat([gain[..., None].view(torch.uint8), codes], dim=-1)
    records_BTHX: Tensor = record.unflatten(0, (batch, tokens))
    return records_BTHX.transpose(1, 2)


def _from_records(side: SideCodec, records_BHTX: Tensor) -> Tensor:
    batch = records_BHTX.shape[0]
    record = records_BHTX.transpose(1, 2).flatten(0, 1)
    gain = None
    if side.spec.has_gain:
        gain = record[..., :GAIN_BYTES].contiguous().view(torch.float16).squeeze(-1)
        record = record[..., GAIN_BYTES:]
    states_BTHD: Tensor = side.reconstruct(gain, record).unflatten(0, (batch, -1))
    return states_BTHD.transpose(1, 2)
