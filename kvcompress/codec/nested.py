"""Serving with fewer channels or fewer bits than were stored: the same codec, cut. No torch.

A form that can be cut has `cut(share, bits)` on its spec and `cut(spec)` on its codec. Channels are in order of
importance, so any first ones are a codec; codes are made while serving, in units that do not depend on their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvcompress.codec.codes.registry import CODES, listed, widths
from kvcompress.codec.spec import CodecSpec

if TYPE_CHECKING:
    from kvcompress.codec.contract import CacheCodec


WIDEST = max(CODES)
"""As `bits`: leave all channels as they are stored."""


def check_share(share: float) -> float:
    """Raises ValueError: not above 0 and up to 1."""
    if not 0.0 < share <= 1.0:
        raise ValueError(f"found KV rank {share:g}; expected a share of the stored channels above 0 and up to 1")
    return share


def check_bits(bits: int) -> int:
    """Raises ValueError: no code width."""
    if bits not in CODES:
        raise ValueError(f"found KV bits {bits}; expected {listed(widths())}")
    return bits


def cut_spec(spec: CodecSpec, share: float = 1.0, bits: int = WIDEST) -> CodecSpec:
    """Every layer at a share of its stored channels, in whole channel groups, none of them in more bits than given.

    Raises:
        ValueError: a share outside (0, 1], bits that are no code width, a layer in a form that cannot be cut, or
            nothing to cut.
    """
    check_share(share)
    check_bits(bits)
    if share == 1.0 and bits == WIDEST:
        return spec
    asked = f"KV rank {share:g}" if bits == WIDEST else f"KV bits {bits}"
    if not any(spec.layers):
        raise ValueError(f"found {asked}; no layer of the checkpoint has a codec that could keep less; leave it out")
    layers: list[Any] = list(spec.layers)
    for index, layer in enumerate(layers):
        if layer is not None and not hasattr(layer, "cut"):
            raise ValueError(
                f"layer {index} has a cache of form {layer.form!r}, which cannot be served at {asked}; leave it out"
            )
    return CodecSpec(tuple(None if layer is None else layer.cut(share, bits) for layer in layers))


def cut_codecs(codecs: Sequence[CacheCodec | None], spec: CodecSpec) -> list[CacheCodec | None]:
    """The codecs of a checkpoint as `spec`, made by `cut_spec` from its own, has them."""
    pairs: Any = zip(codecs, spec.layers, strict=True)
    return [codec if codec is None or codec.spec == layer else codec.cut(layer) for codec, layer in pairs]
