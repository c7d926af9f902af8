"""Factored linear layers in vLLM: y = (x @ down^T) @ up^T, for plain, merged and tensor-parallel layers.

vLLM merges neighbouring projections (q, k and v; gate and up) into one layer and loads each part by a shard name. Parts
may have different ranks, and some may be dense; so a layer gets up to three parameters, each with all parts in a row:

    down_weight [sum of ranks, in]      one product gives the latents of all factored parts
    up_weight   [sum of out * rank]     flat, because the parts' ranks differ
    weight      [sum of dense outs, in]

Column-parallel layers divide `up` (and dense weights) by outputs and keep all of `down`; row-parallel ones divide
`down` by inputs and keep all of `up`: their outputs are summed over the ranks afterwards, and `up` is linear. Once
loaded, every matrix becomes a layer of its own under vLLM's unquantized method, which packs it for the platform.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.modeling.low_rank import DOWN, UP
from kvcompress.serving.vllm import compat

_SHARDS = {"q": 0, "k": 1, "v": 2, None: 0}


@dataclass(frozen=True)
class Part:
    """One projection of a layer on this tensor-parallel rank; `rank` is None where it is dense."""

    rank: int | None
    outputs: int
    output_rank: int
    """Which slice of the outputs this process has, where they are divided."""


def part_ranks(prefix: str, merged: Mapping[str, Sequence[str]], ranks: Mapping[str, int]) -> list[int | None]:
    """The rank of every projection of a layer, in vLLM's order.

    Args:
        prefix: vLLM's name of the layer, such as model.layers.0.self_attn.qkv_proj.
        merged: the projections of each merged layer, by the last part of its name.
        ranks: rank by the checkpoint's name of the projection.
    """
    parent, _, own = prefix.rpartition(".")
    return [ranks.get(f"{parent}.{name}") for name in merged.get(own, [own])]


class LowRankLinearMethod(compat.LinearMethodBase):  # type: ignore[misc]
    """Creates, loads and applies the weights of one layer with at least one factored part."""

    def __init__(self, prefix: str, ranks: Sequence[int | None]) -> None:
        self.prefix, self.ranks = prefix, ranks
        self.parts: list[Part] = []
        self._loaded: set[tuple[str, int]] = set()
        self.dense = compat.UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **options: Any,
    ) -> None:
        if len(output_partition_sizes) != len(self.ranks):
            raise ValueError(
                f"{self.prefix} merges {len(output_partition_sizes)} projections and config.json has factors for "
                f"{len(self.ranks)}; kvcompress cannot serve this model class with factored weights"
            )
        columns = slice(None)
        if input_size_per_partition < input_size:
            first = compat.layer_parallel(layer)[0] * input_size_per_partition
            columns = slice(first, first + input_size_per_partition)
        self.parts = [
            Part(rank, outputs, compat.output_rank(layer, index))
            for index, (rank, outputs) in enumerate(zip(self.ranks, output_partition_sizes, strict=True))
        ]

        def add(name: str, shapes: Sequence[tuple[int, int]], place: Callable[[Tensor, Part], Tensor]) -> None:
            """A parameter of all parts' elements in a row; `place` cuts this rank's piece out of a stored tensor."""
            sizes = [outer * inner for outer, inner in shapes]
            flat = nn.Parameter(torch.empty(sum(sizes), dtype=params_dtype), requires_grad=False)

            def load(parameter: Tensor, stored: Tensor, shard: str | int | None = None) -> None:
                index = shard if isinstance(shard, int) else _SHARDS[shard]
                piece = place(stored, self.parts[index])
                if tuple(piece.shape) != shapes[index]:
                    raise ValueError(
                        f"{self.prefix}.{name} has shape {tuple(stored.shape)} in part {index}, which does not fit "
                        "config.json; compress the model again"
                    )
                start = sum(sizes[:index])
                self._loaded.add((name, index))
                parameter.data[start : start + sizes[index]].copy_(piece.flatten())

            compat.set_weight_loader(flat, load)
            layer.register_parameter(name, flat)

        inputs = input_size_per_partition
        add(DOWN, [(part.rank or 0, inputs) for part in self.parts], lambda stored, _: stored[:, columns])
        add(UP, [(part.outputs if part.rank else 0, part.rank or 0) for part in self.parts], _outputs)
        if None in self.ranks:
            shapes = [(0 if part.rank else part.outputs, inputs) for part in self.parts]
            add("weight", shapes, lambda stored, part: _outputs(stored, part)[:, columns])

    def process_weights_after_loading(self, layer: Any) -> None:
        self._require_all()
        inputs = getattr(layer, DOWN).numel() // sum(part.rank or 0 for part in self.parts)
        layer.down = self._packed(getattr(layer, DOWN).data.view(-1, inputs))
        ups = [part for part in self.parts if part.rank]
        sizes = [part.outputs * (part.rank or 0) for part in ups]
        layer.ups = nn.ModuleList(
            self._packed(flat.view(part.outputs, -1))
            for part, flat in zip(ups, getattr(layer, UP).data.split(sizes), strict=True)
        )
        delattr(layer, DOWN)
        delattr(layer, UP)
        if None in self.ranks:
            weight = layer.weight.data.view(-1, inputs)
            delattr(layer, "weight")
            layer.rest = self._packed(weight)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        latents = iter(self._product(layer.down, x).split([part.rank for part in self.parts if part.rank], dim=-1))
        ups = iter(layer.ups)
        dense: Any = iter(())
        if None in self.ranks:
            widths = [part.outputs for part in self.parts if not part.rank]
            dense = iter(self._product(layer.rest, x).split(widths, dim=-1))
        outputs = [
            self._product(next(ups), next(latents).contiguous()) if part.rank else next(dense) for part in self.parts
        ]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return output if bias is None else output + bias

    def _require_all(self) -> None:
        """Raises ValueError: a part's tensor was not in the checkpoint, and would be whatever memory held."""
        for index, rank in enumerate(self.ranks):
            for name in (DOWN, UP) if rank else ("weight",):
                if (name, index) not in self._loaded:
                    raise ValueError(
                        f"the checkpoint lacks {name} of part {index} of {self.prefix}, which config.json says it has; "
                        "get the checkpoint again, or compress the model again"
                    )

    def _packed(self, weight_OI: Tensor) -> nn.Module:
        linear = nn.Module()
        linear.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.dense.process_weights_after_loading(linear)
        return linear

    def _product(self, linear: nn.Module, x: Tensor) -> Tensor:
        product: Tensor = self.dense.apply(linear, x)
        return product


def _outputs(stored: Tensor, part: Part) -> Tensor:
    """This process's rows, where outputs are divided at all."""
    if stored.shape[0] == part.outputs:
        return stored
    return stored[part.output_rank * part.outputs : (part.output_rank + 1) * part.outputs]
