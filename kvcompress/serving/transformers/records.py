"""Records of a token and head, gain first, as transformers caches keep them: `uint8 [batch, heads, tokens, bytes]`."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress.codec.layer import SideCodec
from kvcompress.codec.spec import GAIN_BYTES, SideSpec


def pack(gain_TH: Tensor | None, codes_THB: Tensor, batch: int) -> Tensor:
    """Encoded tokens of `batch` sequences, one after the other, to records."""
    record = codes_THB if gain_TH is None else torch.cat([gain_TH[..., None].view(torch.uint8), codes_THB], dim=-1)
    records_BTHX: Tensor = record.unflatten(0, (batch, -1))
    return records_BTHX.transpose(1, 2)


def unpack(spec: SideSpec, records_BHTX: Tensor) -> tuple[Tensor | None, Tensor]:
    """Inverse of `pack`: (gain_TH or None, codes_THB)."""
    record = records_BHTX.transpose(1, 2).flatten(0, 1)
    if not spec.has_gain:
        return None, record
    gain_TH = record[..., :GAIN_BYTES].contiguous().view(torch.float16).squeeze(-1)
    return gain_TH, record[..., GAIN_BYTES:]


def to_records(side: SideCodec, states_BHTD: Tensor) -> Tensor:
    """Encode keys or values, every head by itself."""
    return pack(*side.encode(tokens_first(states_BHTD)), batch=states_BHTD.shape[0])


def from_records(side: SideCodec, records_BHTX: Tensor) -> Tensor:
    """Keys or values `[batch, heads, tokens, head_dim]`, float32."""
    return heads_first(side.reconstruct(*unpack(side.spec, records_BHTX)), batch=records_BHTX.shape[0])


def tokens_first(states_BHTD: Tensor) -> Tensor:
    """Sequences one after the other: `[batch * tokens, heads, head_dim]`."""
    return states_BHTD.transpose(1, 2).flatten(0, 1)


def heads_first(states_THD: Tensor, batch: int) -> Tensor:
    """Inverse of `tokens_first`."""
    states_BTHD: Tensor = states_THD.unflatten(0, (batch, -1))
    return states_BTHD.transpose(1, 2)
