"""Linear layers of a checkpoint turned into factors: which there are, what the result looks like, and its writing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvcompress.checkpoint.reader import CONFIG_VERSION, QUANT_METHOD
from kvcompress.checkpoint.safetensors_file import TensorInfo, TensorSpec
from kvcompress.geometry import ModelGeometry
from kvcompress.methods.base import Outline
from kvcompress.methods.ranks import Ranks, Shape

if TYPE_CHECKING:
    from torch import Tensor

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a decoder layer, in the order in which they run."""

DTYPES = ("F32", "F16", "BF16")
_WEIGHT = re.compile(r"model\.layers\.(\d+)\.((?:\w+\.)?(\w+))\.weight")


@dataclass(frozen=True)
class Linear:
    """One weight matrix: its decoder layer, its module's name inside that layer, and how it is stored."""

    layer: int
    local: str
    dtype: str
    shape: Shape

    @property
    def name(self) -> str:
        """The module's name in the model."""
        return f"model.layers.{self.layer}.{self.local}"

    @property
    def target(self) -> str:
        """The last part of the name, such as q_proj."""
        return self.local.rpartition(".")[2]

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
    found: dict[tuple[int, str], Linear] = {}
    for name, (dtype, shape) in before.tensors.items():
        match = _WEIGHT.fullmatch(name)
        if match and match[3] in targets and len(shape) == 2:
            if dtype not in DTYPES:
                raise ValueError(f"{name} is stored as {dtype}; expected one of {', '.join(DTYPES)} to factor it")
            found[int(match[1]), match[3]] = Linear(int(match[1]), match[2], dtype, Shape(*shape))
    done = {tuple(name.split(".")[2::2]) for name in _section(before.config)}
    linears: list[Linear] = []
    for layer in range(ModelGeometry.from_config(before.config).num_layers):
        for target in sorted(targets, key=TARGETS.index):
            if (layer, target) in found:
                linears.append(found[layer, target])
            elif (str(layer), target) in done:
                raise ValueError(
                    f"{target} of layer {layer} was factored by an earlier stage; leave it out of one stage's targets"
                )
            else:
                raise ValueError(
                    f"the checkpoint has no weight for {target} of layer {layer}; leave {target} out of targets"
                )
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
