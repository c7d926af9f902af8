"""The base model's own quantization beneath ours: config.json has one slot for a method, and both want it.

Whatever vLLM asks a quantization config that does not concern a compressed cache goes on to the config that vLLM
itself would have made for the base model; without one, nothing is quantized.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.platforms import current_platform

from kvcompress.checkpoint.quantized import check_section, method_of
from kvcompress.serving.vllm.compat.version import vllm_version

_SET_ON_CONFIGS = ("packed_modules_mapping", "use_deep_gemm")
"""What vLLM sets on a model's quantization config once it is made, for the config's own use."""


class DelegatingConfig(QuantizationConfig):  # type: ignore[misc]
    """The hooks of a quantization config that `base` answers, where there is one."""

    def __init__(self, section: Mapping[str, Any] | None) -> None:
        """From the base model's own quantization_config, or None.

        Raises:
            ValueError: it quantizes the KV cache too, or vLLM cannot serve it on this platform.
        """
        super().__init__()
        self.base: Any = None
        if section is not None:
            check_section(section)
            self.base = quantization_of(section)
            self._ignore_unexpected_suffixes = self.base._ignore_unexpected_suffixes

    def __getattr__(self, name: str) -> Any:
        # vLLM looks for settings that only some configs have, such as weight_block_size.
        base = self.__dict__.get("base")
        if base is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        return getattr(base, name)

    def base_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The base config's treatment of a layer; None leaves it to vLLM."""
        if self.base is None:
            return None
        for name in _SET_ON_CONFIGS:
            if name in vars(self):
                setattr(self.base, name, vars(self)[name])
        return self.base.get_quant_method(layer, prefix)

    def supported_dtypes(self, ours: list[torch.dtype]) -> list[torch.dtype]:
        """Those of ours that the base model's kernels take."""
        if self.base is None:
            return ours
        theirs = self.base.get_supported_act_dtypes()
        return [dtype for dtype in ours if dtype in theirs]

    def get_min_capability(self) -> int:
        return 0 if self.base is None else int(self.base.get_min_capability())

    def get_cache_scale_mapper(self) -> Any:
        return super().get_cache_scale_mapper() if self.base is None else self.base.get_cache_scale_mapper()

    def get_checkpoint_weight_mapper(self) -> Any:
        return super().get_checkpoint_weight_mapper() if self.base is None else self.base.get_checkpoint_weight_mapper()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        if self.base is not None:
            self.base.apply_vllm_mapper(hf_to_vllm_mapper)

    def maybe_update_config(self, *arguments: Any, **options: Any) -> None:
        if self.base is not None:
            self.base.maybe_update_config(*arguments, **options)


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
