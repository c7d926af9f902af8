"""Serving at a smaller rank than was stored: the same codec, cut to its first channels. No torch.

A form that can be cut has `cut(share)` on its spec and `cut(spec)` on its codec; channels are in order of importance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvcompress.codec.spec import CodecSpec

if TYPE_CHECKING:
    from kvcompress.codec.forms import CacheCodec


def check_share(share: float) -> float:
    """Raises ValueError: not above 0 and up to 1."""
    if not 0.0 < share <= 1.0:
        raise ValueError(f"found KV rank {share:g}; expected a share of the stored channels above 0 and up to 1")
    return share


def cut_spec(spec: CodecSpec, share: float) -> CodecSpec:
    """Every layer at a share of its stored channels, in whole channel groups.

    Raises:
        ValueError: a share outside (0, 1], a layer in a form that cannot be cut, or nothing to cut.
    """
    if check_share(share) == 1.0:
        return spec
    if not any(spec.layers):
        raise ValueError(
            f"found KV rank {share:g}; no layer of the checkpoint has a codec whose channels could be left out; "
            "leave the KV rank at 1"
        )
    layers: list[Any] = list(spec.layers)
    for index, layer in enumerate(layers):
        if layer is not None and not hasattr(layer, "cut"):
            raise ValueError(
                f"layer {index} has a cache of form {layer.form!r}, which cannot be served at a smaller rank; "
                "leave the KV rank at 1"
            )
    return CodecSpec(tuple(None if layer is None else layer.cut(share) for layer in layers))


def cut_codecs(codecs: Sequence[CacheCodec | None], spec: CodecSpec) -> list[CacheCodec | None]:
    """The codecs of a checkpoint as `spec`, made by `cut_spec` from its own, has them."""
    pairs: Any = zip(codecs, spec.layers, strict=True)
    return [codec if codec is None or codec.spec == layer else codec.cut(layer) for codec, layer in pairs]
