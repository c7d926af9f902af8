"""vLLM's Llama around another attention; apart from the rest of `compat` because only our model class needs it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import WeightsMapper

_MAPPER = WeightsMapper(orig_to_new_stacked={".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)})


class _Model(LlamaModel):  # type: ignore[misc]
    hf_to_vllm_mapper = _MAPPER


class LlamaWith(LlamaForCausalLM):  # type: ignore[misc]
    """A language model whose layers attend by `attention`, which is made and called as vLLM's own is."""

    attention: ClassVar[type[nn.Module]]
    hf_to_vllm_mapper = _MAPPER
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {"gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._quant_config = vllm_config.quant_config

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None) -> nn.Module:
        attention = self.attention

        class Layer(LlamaDecoderLayer):  # type: ignore[misc]
            def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
                super().__init__(vllm_config, prefix, config, attn_layer_type=attention)

        return _Model(vllm_config=vllm_config, prefix=prefix, layer_type=Layer)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = super().load_weights(weights)
        self.loaded(self._quant_config)
        return loaded

    def loaded(self, quant_config: Any) -> None:
        """The checkpoint has been read."""
