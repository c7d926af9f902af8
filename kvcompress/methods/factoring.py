"""Linear layers of a checkpoint turned into factors: which there are, what the result looks like, and its writing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcompress.checkpoint.reader import CONFIG_VERSION, QUANT_METHOD
from kvcompress.checkpoint.safetensors_file import TensorInfo, TensorSpec
from kvcompress.families import LINEARS, family_of
from kvcompress.methods.base import Outline
from kvcompress.methods.ranks import Ranks, Shape

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Linear:
    """One weight matrix: its decoder layer, its module's name inside that layer and in the model, how it is stored."""

    layer: int
    local: str
    name: str
    dtype: str
    shape: Shape

    def factors(self, rank: int) -> tuple[TensorSpec, TensorSpec]:
        """What is stored in place of the weight: down and up."""
        return (
            TensorSpec(f"{self.name}.down_weight", self.dtype, (rank, self.shape.in_features)),
            TensorSpec(f"{self.name}.up_weight", self.dtype, (self.shape.out_features, rank)),
        )


def find(targets: Sequence[str], before: Outline) -> list[Linear]:
    """The target weights of a checkpoint, layer by layer.

    Raises:
        ValueError: one is missing, was factored by an earlier stage, or is stored in a dtype that has no SVD.
    """
    done, names = _section(before.config), family_of(before.config).names
    locals_ = [(target, names.linears[target]) for target in LINEARS if target in targets]
    linears: list[Linear] = []
    for layer, (target, local) in itertools.product(range(before.geometry.num_layers), locals_):
        name = f"{names.layer(layer)}{local}"
        if name in done:
            raise ValueError(
                f"{target} of layer {layer} was factored by an earlier stage; leave it out of one stage's targets"
            )
        if f"{name}.weight" not in before.tensors:
            raise ValueError(
                f"the checkpoint has no weight for {target} of layer {layer}; leave {target} out of targets"
            )
        dtype, shape = before.tensors[f"{name}.weight"]
        if dtype not in DTYPES:
            raise ValueError(f"{name}.weight is stored as {dtype}; expected one of {', '.join(DTYPES)} to factor it")
        linears.append(Linear(layer, local, name, dtype, Shape(*shape)))
    return linears


def factored(before: Outline, linears: Sequence[Linear], ranks: Ranks) -> Outline:
    """The outline once these matrices are factors of these ranks (None: left dense)."""
    tensors, weights = dict(before.tensors), _section(before.config)
    for linear, rank in zip(linears, ranks, strict=True):
        if rank is not None:
            del tensors[f"{linear.name}.weight"]
            tensors |= {spec.name: (spec.dtype, spec.shape) for spec in linear.factors(rank)}
            weights[linear.name] = {"rank": rank}
    section = {"quant_method": QUANT_METHOD, "version": CONFIG_VERSION, "weights": weights}
    return Outline({**before.config, "quantization_config": section}, tensors)


def _section(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict((config.get("quantization_config") or {}).get("weights") or {})


class Factors:
    """Replaces weights by factors while shards are copied (`checkpoint.writer.Transform`)."""

    def __init__(self, ranks: Mapping[Linear, int], load: Callable[[Linear], tuple[Tensor, Tensor]]) -> None:
        """`load` gives down and up of one matrix."""
        self._ranks = {f"{linear.name}.weight": (linear, rank) for linear, rank in ranks.items()}
        self._load = load

    def plan(self, info: TensorInfo) -> Sequence[TensorSpec] | None:
        if info.name not in self._ranks:
            return None
        linear, rank = self._ranks[info.name]
        return linear.factors(rank)

    def apply(self, name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        linear, rank = self._ranks[name]
        return zip((spec.name for spec in linear.factors(rank)), self._load(linear), strict=True)
