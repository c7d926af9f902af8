"""The customs house: everything that depends on the vLLM version. Nothing else in kvcompress imports vLLM.

Inwards, what vLLM says becomes plain facts of ours: `Engine` its options, `Layer` an attention layer, `Batch` a step.
Nobody else reads attributes of vLLM's objects. Outwards, `Backend`, `MetadataBuilder` and `Implementation` have the
shapes of vLLM's calls and leave to forms of cache what is theirs. To support another release, change this package and
run the end-to-end tests.

    version      the range we support, checked before anything else is imported
    engine       an engine's options, and running its model
    layers       attention layers: what they are, and what is put in their place
    attention    the base classes of a form's attention
    linear       linear layers
    delegation   the base model's own quantization
    complete     whether a checkpoint has filled a model
    hooks        where vLLM asks us, and where we make it ask
    llama        the model class that ours extends; not imported here, because it is slow
    offline      an engine in this process, for evaluations; not imported here either
    peer         vLLM's own attention on a CPU, for benchmarks; likewise
"""

from __future__ import annotations

# First: what the others import exists in this form only in the supported range.
from kvcompress.serving.vllm.compat.version import SUPPORTED_VLLM, check_version, vllm_version  # isort: skip

from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import CircularBufferSpec, FullAttentionSpec

from kvcompress.serving.vllm.compat.attention import Backend, Batch, Implementation, MetadataBuilder
from kvcompress.serving.vllm.compat.complete import require_all
from kvcompress.serving.vllm.compat.delegation import DelegatingConfig
from kvcompress.serving.vllm.compat.engine import (
    Engine,
    capacity_tokens,
    current_engine,
    is_first_rank_of_machine,
    run_model,
    running,
    tensor_parallel,
    worker_names,
)
from kvcompress.serving.vllm.compat.hooks import extend_loader, extend_worker, register_model
from kvcompress.serving.vllm.compat.layers import (
    Layer,
    add_cache_layer,
    answered_by,
    attach,
    attention_layers,
    block_size_of,
    full_attention,
    is_attention,
    layer_metadata,
)
from kvcompress.serving.vllm.compat.linear import layer_parallel, output_rank, set_weight_loader

logger = init_logger("vllm.kvcompress")
"""A child of vLLM's own logger: an operator sees our lines among the engine's."""
