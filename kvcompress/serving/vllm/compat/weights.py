"""Linear layers and quantization methods."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from kvcompress.checkpoint.quantized import method_of
from kvcompress.serving.vllm.compat.version import vllm_version

SET_ON_CONFIGS = ("packed_modules_mapping", "use_deep_gemm")
"""What vLLM sets on a model's quantization config once it is made, for the config's own use."""


def layer_parallel(layer: Any) -> tuple[int, int]:
    """(rank, world size) over which a linear layer is divided; (0, 1) where it is not."""
    return int(getattr(layer, "tp_rank", 0)), int(getattr(layer, "tp_size", 1))


def output_rank(layer: Any, part: int) -> int:
    """Which slice of a merged layer's part this process has; with fewer KV heads than ranks, ranks share heads."""
    rank, _ = layer_parallel(layer)
    if isinstance(layer, QKVParallelLinear) and part > 0:
        return rank // int(layer.num_kv_head_replicas)
    return rank


def quantization_of(section: Mapping[str, Any]) -> QuantizationConfig:
    """The config that vLLM makes for a model with this quantization_config.

    Raises:
        ValueError: vLLM has no such method, or not for this platform, or not with these settings.
    """
    name = method_of(section)
    try:
        current_platform.verify_quantization(name)
        # vLLM changes what it is given, and expects its own spelling of the name.
        return get_quantization_config(name).from_config({**copy.deepcopy(dict(section)), "quant_method": name})
    except (AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error) or "it does not know this combination of settings"
        raise ValueError(
            f"vLLM {vllm_version} does not serve the base model's own quantization ({name}): {reason}"
        ) from error


def set_weight_loader(parameter: torch.nn.Parameter, load: Any) -> None:
    """Have vLLM fill a parameter by `load(parameter, stored tensor)`, with the shard's name or number for parts."""
    set_weight_attrs(parameter, {"weight_loader": load})
