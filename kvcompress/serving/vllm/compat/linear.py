"""Linear layers: what a rank has of them, and how their weights are loaded."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.utils import set_weight_attrs


def layer_parallel(layer: Any) -> tuple[int, int]:
    """(rank, world size) over which a linear layer is divided; (0, 1) where it is not."""
    return int(getattr(layer, "tp_rank", 0)), int(getattr(layer, "tp_size", 1))


def output_rank(layer: Any, part: int) -> int:
    """Which slice of a merged layer's part this process has; with fewer KV heads than ranks, ranks share heads."""
    rank, _ = layer_parallel(layer)
    if isinstance(layer, QKVParallelLinear) and part > 0:
        return rank // int(layer.num_kv_head_replicas)
    return rank


def set_weight_loader(parameter: torch.nn.Parameter, load: Any) -> None:
    """Have vLLM fill a parameter by `load(parameter, stored tensor)`, with the shard's name or number for parts."""
    set_weight_attrs(parameter, {"weight_loader": load})
