"""Records of a token and head as transformers caches keep them: `uint8 [batch, heads, tokens, bytes]`."""

from __future__ import annotations

from torch import Tensor

from kvcompress.codec.bands import SideSpec
from kvcompress.codec.heads.codec import SideCodec
from kvcompress.codec.record import Record


def pack(encoded: Record, batch: int) -> Tensor:
    """Encoded tokens of `batch` sequences, one after the other, to records."""
    records_BTHX: Tensor = encoded.to_bytes().unflatten(0, (batch, -1))
    return records_BTHX.transpose(1, 2)


def unpack(spec: SideSpec, records_BHTX: Tensor) -> Record:
    """Inverse of `pack`."""
    return Record.from_bytes(records_BHTX.transpose(1, 2).flatten(0, 1), spec)


def to_records(side: SideCodec, states_BHTD: Tensor) -> Tensor:
    """Encode keys or values, every head by itself."""
    return pack(side.encode(tokens_first(states_BHTD)), batch=states_BHTD.shape[0])


def from_records(side: SideCodec, records_BHTX: Tensor) -> Tensor:
    """Keys or values `[batch, heads, tokens, head_dim]`, float32."""
    return heads_first(side.reconstruct(unpack(side.spec, records_BHTX)), batch=records_BHTX.shape[0])


def tokens_first(states_BHTD: Tensor) -> Tensor:
    """Sequences one after the other: `[batch * tokens, heads, head_dim]`."""
    return states_BHTD.transpose(1, 2).flatten(0, 1)


def heads_first(states_THD: Tensor, batch: int) -> Tensor:
    """Inverse of `tokens_first`."""
    states_BTHD: Tensor = states_THD.unflatten(0, (batch, -1))
    return states_BTHD.transpose(1, 2)
