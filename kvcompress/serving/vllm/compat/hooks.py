"""Where vLLM finds what is ours, and where we have it ask: it has no hooks for the two moments that we need."""

from __future__ import annotations

import functools
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.registry import ModelRegistry
from vllm.v1.worker.worker_base import WorkerWrapperBase


def register_model(architecture: str, class_path: str) -> None:
    """Make vLLM serve an architecture with a class given as `module:Class`, imported only where it is used."""
    if architecture not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(architecture, class_path)


def extend_worker() -> None:
    """Have workers call `quant_config.caches_ready(model runner, cache config)` once weights and caches are there.

    That is before warm-up and before the first request, and an exception stops the engine.
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
