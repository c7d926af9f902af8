"""Everything that depends on the vLLM version: the range we support, the names we import, and the shapes of its calls.

Nothing else in the plug-in imports vLLM, but `compat_llama`, whose import is slow. To support another release, change
these files and run the end-to-end tests.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from vllm.version import __version__ as vllm_version

from kvcompress.checkpoint.quantized import method_of

SUPPORTED_VLLM = ((0, 31), (0, 33))
"""First supported and first unsupported (major, minor)."""


def check_version(found: str) -> None:
    """Refuse a vLLM we have not been tested with, before its changed interfaces fail in stranger ways.

    Raises:
        RuntimeError: outside `SUPPORTED_VLLM`.
    """
    first, stop = SUPPORTED_VLLM
    match = re.match(r"(\d+)\.(\d+)", found)
    if match is None or not first <= (int(match[1]), int(match[2])) < stop:
        supported = f">= {first[0]}.{first[1]}, < {stop[0]}.{stop[1]}"
        raise RuntimeError(
            f"found vLLM {found}; kvcompress serves through vLLM {supported}; install such a vLLM or another kvcompress"
        )


check_version(vllm_version)

# The rest exists in this form only in the supported range, so it comes after the check.
from vllm.config import VllmConfig, get_current_vllm_config  # noqa: E402
from vllm.distributed import (  # noqa: E402
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.distributed.parallel_state import get_pp_group, get_tp_group, get_world_group  # noqa: E402
from vllm.forward_context import get_forward_context, set_forward_context  # noqa: E402
from vllm.logger import init_logger  # noqa: E402
from vllm.model_executor.layers.attention import Attention, MLAAttention  # noqa: E402
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase  # noqa: E402
from vllm.model_executor.layers.linear import (  # noqa: E402
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import (  # noqa: E402
    QUANTIZATION_METHODS,
    get_quantization_config,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (  # noqa: E402
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod  # noqa: E402
from vllm.model_executor.model_loader.base_loader import BaseModelLoader  # noqa: E402
from vllm.model_executor.models.registry import ModelRegistry  # noqa: E402
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index  # noqa: E402
from vllm.model_executor.utils import set_weight_attrs  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.sequence import IntermediateTensors  # noqa: E402
from vllm.v1.attention.backend import (  # noqa: E402
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.attention.backends.registry import register_backend as _register_backend  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    AttentionSpec,
    CircularBufferSpec,
    FullAttentionSpec,
    KVCacheLayout,
)
from vllm.v1.worker.worker_base import WorkerWrapperBase  # noqa: E402

__all__ = [
    "BACKEND_NAME",
    "DEVICE_BACKEND_NAME",
    "DEVICE_LATENT_BACKEND_NAME",
    "LATENT_BACKEND_NAME",
    "QUANTIZATION_METHODS",
    "SET_ON_CONFIGS",
    "SHARED_BACKEND_NAME",
    "SUPPORTED_VLLM",
    "Attention",
    "AttentionBackend",
    "AttentionCGSupport",
    "AttentionImpl",
    "AttentionLayerBase",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "AttentionSpec",
    "AttentionType",
    "BaseKVCacheMethod",
    "CircularBufferSpec",
    "ColumnParallelLinear",
    "CommonAttentionMetadata",
    "FullAttentionSpec",
    "KVCacheLayout",
    "LinearBase",
    "LinearMethodBase",
    "MLAAttention",
    "MultipleOf",
    "QuantizationConfig",
    "QuantizeMethodBase",
    "ReplicatedLinear",
    "RowParallelLinear",
    "UnquantizedLinearMethod",
    "VllmConfig",
    "WeightsMapper",
    "add_cache_layer",
    "attach",
    "attention_layers",
    "capacity_tokens",
    "check_version",
    "device",
    "extend_loader",
    "extend_worker",
    "extract_layer_index",
    "get_current_vllm_config",
    "is_cpu",
    "is_first_rank_of_machine",
    "layer_device",
    "layer_metadata",
    "layer_parallel",
    "logger",
    "most_decode_queries",
    "num_decoder_layers",
    "output_rank",
    "quantization_of",
    "register_backend",
    "register_model",
    "register_quantization_config",
    "run_model",
    "running",
    "sentinel_of",
    "set_weight_loader",
    "tensor_parallel",
    "total_num_kv_heads",
    "vllm_version",
    "worker_names",
]

_OWN_NAMES = hasattr(AttentionBackendEnum, "register")
"""From 0.32 on a plug-in's backends have names; before, all of everybody's have one."""

BACKEND_NAME, DEVICE_BACKEND_NAME, SHARED_BACKEND_NAME, LATENT_BACKEND_NAME, DEVICE_LATENT_BACKEND_NAME = (
    ("KVCOMPRESS", "KVCOMPRESS_CUDA", "KVCOMPRESS_SHARED", "KVCOMPRESS_LATENT", "KVCOMPRESS_LATENT_CUDA")
    if _OWN_NAMES
    else ("CUSTOM",) * 5
)

SET_ON_CONFIGS = ("packed_modules_mapping", "use_deep_gemm")
"""What vLLM sets on a model's quantization config once it is made, for the config's own use."""

logger = init_logger("vllm.kvcompress")
"""A child of vLLM's own logger: an operator sees our lines among the engine's."""


def register_backend(name: str, class_path: str) -> None:
    """Add an attention backend under its own name; vLLM itself refuses the second registration of one name."""
    if not _OWN_NAMES:
        _register_backend(AttentionBackendEnum[name], class_path)
    elif name not in AttentionBackendEnum.__members__:
        _register_backend(name, class_path)


def register_model(architecture: str, class_path: str) -> None:
    """Make vLLM serve an architecture with a class given as `module:Class`, imported only where it is used."""
    if architecture not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(architecture, class_path)


def attach(layer: Any, backend: type[AttentionBackend], impl: AttentionImpl, get_kv_cache_spec: Any) -> None:
    """Replace the attention backend, implementation and cache spec that vLLM has chosen for a layer."""
    layer.attn_backend = backend
    layer.backend = AttentionBackendEnum[backend.get_name()]
    layer.impl = impl
    layer.get_kv_cache_spec = get_kv_cache_spec


def add_cache_layer(config: VllmConfig, name: str, layer: AttentionLayerBase) -> None:
    """Enter a layer that owns a cache and computes nothing into vLLM's books.

    Raises:
        ValueError: there is one of that name.
    """
    layers = config.compilation_config.static_forward_context
    if name in layers:
        raise ValueError(f"vLLM has two layers named {name}")
    layers[name] = layer


def attention_layers(config: VllmConfig) -> list[Any]:
    """Every attention layer of this process, whether it has a codec or not."""
    return [
        layer for layer in config.compilation_config.static_forward_context.values() if isinstance(layer, Attention)
    ]


def extend_worker() -> None:
    """Have workers call `quant_config.caches_ready(model runner, cache config)` once weights and caches are there.

    That is before warm-up and before the first request, and an exception stops the engine. vLLM has no such hook.
    """
    original = WorkerWrapperBase.initialize_from_config
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def extended(self: Any, kv_cache_configs: list[Any]) -> None:
        original(self, kv_cache_configs)
        ready = getattr(self.vllm_config.quant_config, "caches_ready", None)
        if ready is not None:
            ready(self.worker.model_runner, kv_cache_configs[self.global_rank])

    WorkerWrapperBase.initialize_from_config = extended


def extend_loader() -> None:
    """Have loaders call `quant_config.built(model)` on a model with our quantization before its weights are read.

    Draft models with another quantization, or none, are left alone, though they are built beside ours.
    """
    original = BaseModelLoader.create_model
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def extended(self: Any, vllm_config: VllmConfig, model_config: Any, *arguments: Any, **options: Any) -> Any:
        model = original(self, vllm_config, model_config, *arguments, **options)
        built = getattr(vllm_config.quant_config, "built", None)
        if built is not None and model_config.quantization == vllm_config.quant_config.get_name():
            built(model, model_config.model)
        return model

    BaseModelLoader.create_model = extended


def run_model(runner: Any, config: VllmConfig, tokens_T: Tensor) -> None:
    """One text from position 0 through the model, uncompiled; attention layers get no metadata.

    Collective: every rank and pipeline stage calls it.
    """
    stage = get_pp_group()
    received = None
    if not stage.is_first_rank:
        received = IntermediateTensors(stage.recv_tensor_dict(all_gather_group=get_tp_group()))
    positions_T = torch.arange(tokens_T.shape[0], device=tokens_T.device)
    context = set_forward_context(None, config, num_tokens=tokens_T.shape[0], slot_mapping={}, skip_compiled=True)
    with torch.inference_mode(), context:
        output = runner.get_model()(input_ids=tokens_T, positions=positions_T, intermediate_tensors=received)
    if not stage.is_last_rank:
        stage.send_tensor_dict(output.tensors, all_gather_group=get_tp_group())


def running(config: VllmConfig, metadata: dict[str, Any], tokens: int) -> AbstractContextManager[None]:
    """A step of so many tokens in which layers find their metadata by name."""
    context: AbstractContextManager[None] = set_forward_context(metadata, config, num_tokens=tokens, slot_mapping={})
    return context


def capacity_tokens(config: VllmConfig, kv_cache_config: Any) -> int:
    """Tokens that fit into the cache, as vLLM itself counts them."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    return int(get_kv_cache_capacity(config, kv_cache_config)[0])


def sentinel_of(config: VllmConfig | None) -> Any:
    """The engine's `sentinel.Sentinel`, or None."""
    return getattr(getattr(config, "quant_config", None), "sentinel", None)


def worker_names(config: VllmConfig) -> tuple[str, int]:
    """A name that no other worker of the server has, and the number of its engine."""
    engine = int(config.parallel_config.data_parallel_index)
    return f"{engine}-{int(get_world_group().rank)}", engine


def device(config: VllmConfig) -> torch.device:
    """Where this process serves."""
    return torch.device(config.device_config.device_type)


def most_decode_queries(config: VllmConfig) -> int:
    """Most queries of a request in a step that decodes: a token and its drafts, and some drafters' masks for them."""
    return 1 + 2 * int(config.num_speculative_tokens)


def is_cpu() -> bool:
    """Whether this process serves on the CPU."""
    return bool(current_platform.is_cpu())


def num_decoder_layers(config: VllmConfig) -> int:
    """Decoder layers of the whole model, over all pipeline stages."""
    return int(config.model_config.hf_text_config.num_hidden_layers)


def total_num_kv_heads(config: VllmConfig) -> int:
    """KV heads of the model, before tensor parallelism divides or replicates them."""
    return int(config.model_config.get_total_num_kv_heads())


def tensor_parallel() -> tuple[int, int]:
    """(rank, world size) of this process."""
    return int(get_tensor_model_parallel_rank()), int(get_tensor_model_parallel_world_size())


def is_first_rank_of_machine() -> bool:
    """Whether this process does what is needed once per machine."""
    return int(get_world_group().local_rank) == 0


def layer_metadata(name: str) -> Any:
    """The running step's attention metadata of the layer of a name."""
    metadata = get_forward_context().attn_metadata
    assert isinstance(metadata, dict), "limits refuses split batches"
    return metadata[name]


def layer_device(layer: Any) -> torch.device:
    """Where vLLM has placed a layer that owns no weights."""
    device: torch.device = layer._k_scale.device
    return device


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
