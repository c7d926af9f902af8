"""The quantization method `kvcompress`: vLLM asks it about every layer of every model class.

`config.json` says `quantization_config: {"quant_method": "kvcompress", "version": 2, "codec": ..., "weights": ...}`. An
attention layer with a codec gets the compressed cache, before vLLM sizes its cache. Linear layers that `weights` lists
are served from their factors; all others keep their ordinary weights, or those of the quantization that the section has
as `base` (`compat.delegation`).
"""

from __future__ import annotations

from typing import Any

import torch

from kvcompress.checkpoint.quantized import base_section
from kvcompress.checkpoint.reader import QUANT_METHOD
from kvcompress.codec.nested import cut_spec
from kvcompress.modeling.low_rank import ranks_of
from kvcompress.serving.loading import kv_bits, kv_rank, read_spec
from kvcompress.serving.vllm import compat
from kvcompress.serving.vllm.low_rank import LowRankLinearMethod, part_ranks
from kvcompress.serving.vllm.sentinel import Sentinel
from kvcompress.serving.vllm.startup import Startup


@compat.register_quantization_config(QUANT_METHOD)
class KVCompressConfig(compat.DelegatingConfig):
    """What config.json says. Made in the front end and sent to the workers, so it holds plain data until they start."""

    def __init__(self, section: dict[str, Any]) -> None:
        super().__init__(base_section({"quantization_config": section}))
        self.stored_spec = read_spec({"quantization_config": section})
        self.codec_spec = cut_spec(self.stored_spec, kv_rank(), kv_bits())
        self.ranks = ranks_of({"quantization_config": section})
        self._startup: Startup | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy for another process starts there by itself.
        return {**self.__dict__, "_startup": None}

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return self.supported_dtypes(compat.Backend.supported_dtypes)

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> KVCompressConfig:
        return cls(config)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> compat.QuantizeMethodBase | None:
        """The treatment of one layer; None leaves it to vLLM.

        Raises:
            ValueError: the checkpoint fails verification, or a layer cannot be served compressed.
        """
        if isinstance(layer, compat.LinearBase):
            ranks = part_ranks(prefix, self.packed_modules_mapping, self.ranks)
            if any(ranks):
                return LowRankLinearMethod(prefix, ranks)
            return self.base_method(layer, prefix) or compat.UnquantizedLinearMethod()
        if not compat.is_attention(layer):
            return self.base_method(layer, prefix)
        known = getattr(layer, "quant_method", None)
        if isinstance(known, CompressedCacheMethod):
            return known
        if self._startup is None:
            self._startup = Startup.begin(compat.current_engine(), self.stored_spec, self.codec_spec)
        index = compat.extract_layer_index(prefix)
        if index >= len(self.codec_spec.layers):
            raise ValueError(
                f"{prefix} is layer {index} and the codec has {len(self.codec_spec.layers)}; "
                "extra prediction layers are not served compressed"
            )
        if self.codec_spec.layers[index] is None:
            self._startup.note_uncompressed(index, compat.Layer.of(layer))
            return self.base_method(layer, prefix)
        return CompressedCacheMethod(self, self._startup, index)

    def built(self, model: Any, source: str) -> None:
        """A model of this quantization stands and its weights are about to be read (`compat.extend_loader`)."""
        compat.require_all(model, self.ranks, source)

    def report(self) -> None:
        """Tell the operator what the cache takes; for models whose layers all go without a codec."""
        if self._startup is not None:
            self._startup.report()

    def caches_ready(self, runner: Any, cache_config: Any) -> None:
        """vLLM's worker has weights and caches (`compat.extend_worker`).

        Raises:
            ValueError: the start-up canary found a fault.
        """
        if self._startup is not None:
            self._startup.caches_ready(runner, cache_config)

    @property
    def sentinel(self) -> Sentinel | None:
        """This process's; there is one once the engine serves."""
        return None if self._startup is None else self._startup.sentinel


class CompressedCacheMethod(compat.BaseKVCacheMethod):  # type: ignore[misc]
    """Gives one attention layer its codec, cache spec and attention implementation."""

    def __init__(self, config: KVCompressConfig, startup: Startup, index: int) -> None:
        super().__init__(config)
        self._startup, self._index = startup, index

    def create_weights(self, layer: Any) -> None:
        self._startup.attach(self._index, compat.Layer.of(layer))

    def process_weights_after_loading(self, layer: Any) -> None:
        self._startup.bind(self._index)
