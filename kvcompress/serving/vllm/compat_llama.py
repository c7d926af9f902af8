"""The parts of vLLM's Llama that our model class extends; apart from `compat` because only that class needs them."""

from __future__ import annotations

from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

__all__ = ["LlamaDecoderLayer", "LlamaForCausalLM", "LlamaModel"]
