"""The codec of a model as plain data: what form each layer's cache has. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from kvcompress.forms import FORMS


class CacheSpec(Protocol):
    """One layer's cache in any form: what plan, manifest, reports and the loaders ask of it."""

    form: ClassVar[str]

    @property
    def num_kv_heads(self) -> int:
        """KV heads of the attention layer."""

    @property
    def head_dim(self) -> int:
        """Channels of each of them."""

    @property
    def group(self) -> tuple[int, ...] | None:
        """Layers whose cache is read together, in order; None for a layer by itself."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token of this layer, everything that is stored included."""

    def summary(self) -> dict[str, Any]:
        """`k` and `v` (rank, bits per channel of head_dim, ...) as plan and manifest show them."""

    def to_json(self) -> dict[str, Any]:
        """Inverse of `from_json`, without the form's name."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError for anything that is not such a spec."""


@dataclass(frozen=True)
class CodecSpec:
    """One entry per decoder layer; None leaves that layer's cache as it is."""

    layers: tuple[CacheSpec | None, ...]

    def to_json(self) -> dict[str, Any]:
        return {"layers": [None if layer is None else {"form": layer.form, **layer.to_json()} for layer in self.layers]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CodecSpec:
        """Inverse of `to_json`.

        Raises:
            ValueError: anything that is not a codec this version can read.
        """
        try:
            layers: Sequence[Any] = data["layers"]
            return cls(tuple(None if layer is None else _layer_from_json(layer) for layer in layers))
        except (KeyError, TypeError) as error:
            raise ValueError(f"the codec description cannot be read ({error!r}); was config.json edited?") from None


def _layer_from_json(data: Mapping[str, Any]) -> CacheSpec:
    if data["form"] not in FORMS:
        raise ValueError(
            f"found a cache of form {data['form']!r}; this version reads {', '.join(FORMS)}; upgrade kvcompress"
        )
    spec: CacheSpec = FORMS[data["form"]].spec.from_json(data)
    return spec
