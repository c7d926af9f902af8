"""Lets `AutoModelForCausalLM.from_pretrained` load checkpoints with factored or quantized weights.

transformers asks the quantizer named by `quant_method` to prepare the model before weights are read. Unregistered, it
would warn, load the rest, and leave factored layers with random weights and quantized ones without their scales.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kvcompress.checkpoint.quantized import base_section
from kvcompress.checkpoint.reader import QUANT_METHOD
from kvcompress.modeling.low_rank import ranks_of, replace_linears
from kvcompress.serving.transformers import base_weights, complete


def register() -> None:
    """Make kvcompress known to transformers in this process. May be called any number of times."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(KVCompressConfig)
        auto.register_quantizer(QUANT_METHOD)(KVCompressQuantizer)


class KVCompressConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` section, kept as it is."""

    def __init__(self, **section: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.__dict__.update(copy.deepcopy(section))


class KVCompressQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps linear layers for factored ones where config.json lists them, and dequantizes those that the base model
    quantizes; a cache codec needs nothing here.
    """

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **options: Any) -> Any:
        config = {"quantization_config": self.quantization_config.to_dict()}
        replace_linears(model, ranks_of(config))
        self._base = base_section(config)
        if self._base is not None:
            self._dtypes = base_weights.expect(model, checkpoint_files or [], self._base)
        if checkpoint_files:
            complete.require_all(model, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        if self._base is not None:
            base_weights.dequantize(model, self._dtypes, self._base)
            # Should the model be saved, its weights are ordinary ones.
            del self.quantization_config.base
        # Factors are ordinary floating-point parameters: casts and moves of the model stay allowed.
        model.is_quantized = False
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
