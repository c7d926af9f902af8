"""One engine: its options as plain facts, and running its model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.parallel_state import get_pp_group, get_tp_group, get_world_group
from vllm.forward_context import set_forward_context
from vllm.sequence import IntermediateTensors


@dataclass(frozen=True)
class Engine:
    """What a compressed cache must know of the engine that serves it, as it is while the model is built."""

    model: str
    """A folder or a hub id."""
    revision: str | None
    download_dir: str | None
    load_format: str
    dtype: torch.dtype
    """Of weights and activations."""
    vocab_size: int
    max_model_len: int
    num_layers: int
    """Decoder layers, over all pipeline stages."""
    num_kv_heads: int
    """Before tensor parallelism divides or replicates them."""
    text_config: Any
    """transformers' config of the language model."""
    uses_mla: bool
    """Whether vLLM runs its own multi-head latent attention."""
    device: torch.device
    cache_dtype: str
    block_size: int
    block_size_chosen: bool
    """Whether the operator has chosen it; if not, vLLM may still choose another."""
    tensor_parallel_size: int
    pipeline_parallel_size: int
    decode_context_parallel_size: int
    prefill_context_parallel_size: int
    ubatching: bool
    """Whether steps are run in two interleaved pieces."""
    speculative_tokens: int
    hybrid_manager: bool
    """Whether layers may have caches of different kinds."""
    transfers_cache: bool
    """Whether another engine or a store is given pages."""
    number: int
    """Which engine of the server it is."""
    config: Any = field(repr=False, compare=False)
    """vLLM's own config, to hand back to it."""

    @classmethod
    def of(cls, config: VllmConfig) -> Engine:
        model, parallel = config.model_config, config.parallel_config
        cache, load = config.cache_config, config.load_config
        return cls(
            model=model.model,
            revision=model.revision,
            download_dir=load.download_dir,
            load_format=load.load_format,
            dtype=model.dtype,
            vocab_size=model.get_vocab_size(),
            max_model_len=model.max_model_len,
            num_layers=model.hf_text_config.num_hidden_layers,
            num_kv_heads=model.get_total_num_kv_heads(),
            text_config=model.hf_text_config,
            uses_mla=model.use_mla,
            device=torch.device(config.device_config.device_type),
            cache_dtype=cache.cache_dtype,
            block_size=cache.block_size,
            block_size_chosen=cache.user_specified_block_size,
            tensor_parallel_size=parallel.tensor_parallel_size,
            pipeline_parallel_size=parallel.pipeline_parallel_size,
            decode_context_parallel_size=parallel.decode_context_parallel_size,
            prefill_context_parallel_size=parallel.prefill_context_parallel_size,
            ubatching=parallel.use_ubatching,
            speculative_tokens=config.num_speculative_tokens,
            hybrid_manager=not config.scheduler_config.disable_hybrid_kv_cache_manager,
            transfers_cache=config.kv_transfer_config is not None,
            number=parallel.data_parallel_index,
            config=config,
        )


def current_engine() -> Engine:
    """The engine whose model this process is building."""
    return Engine.of(get_current_vllm_config())


def capacity_tokens(engine: Engine, kv_cache_config: Any) -> int:
    """Tokens that fit into the cache, as vLLM itself counts them."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    return int(get_kv_cache_capacity(engine.config, kv_cache_config)[0])


def run_model(runner: Any, engine: Engine, tokens_T: Tensor) -> None:
    """One text from position 0 through the model, uncompiled; attention layers get no metadata.

    Collective: every rank and pipeline stage calls it.
    """
    config, stage = engine.config, get_pp_group()
    received = None
    if not stage.is_first_rank:
        received = IntermediateTensors(stage.recv_tensor_dict(all_gather_group=get_tp_group()))
    positions_T = torch.arange(tokens_T.shape[0], device=tokens_T.device)
    context = set_forward_context(None, config, num_tokens=tokens_T.shape[0], slot_mapping={}, skip_compiled=True)
    # Layers that could add a LoRA adapter look up which one every token has: none.
    no_adapter = runner.maybe_select_dummy_loras(config.lora_config, np.array([tokens_T.shape[0]], dtype=np.int32))
    with torch.inference_mode(), no_adapter, context:
        output = runner.get_model()(input_ids=tokens_T, positions=positions_T, intermediate_tensors=received)
    if not stage.is_last_rank:
        stage.send_tensor_dict(output.tensors, all_gather_group=get_tp_group())


def running(engine: Engine, metadata: dict[str, Any], tokens: int) -> AbstractContextManager[None]:
    """A step of so many tokens in which layers find their metadata by name."""
    step: AbstractContextManager[None] = set_forward_context(
        metadata, engine.config, num_tokens=tokens, slot_mapping={}
    )
    return step


def worker_names(engine: Engine) -> tuple[str, int]:
    """A name that no other worker of the server has, and the number of its engine."""
    return f"{engine.number}-{int(get_world_group().rank)}", engine.number


def tensor_parallel() -> tuple[int, int]:
    """(rank, world size) of this process."""
    return int(get_tensor_model_parallel_rank()), int(get_tensor_model_parallel_world_size())


def is_first_rank_of_machine() -> bool:
    """Whether this process does what is needed once per machine."""
    return int(get_world_group().local_rank) == 0
