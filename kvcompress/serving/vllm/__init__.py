"""The vLLM plug-in: `vllm serve DIR` runs a compressed checkpoint of any supported model class, no flag, no model code.

vLLM calls `register` in every process through the entry point `vllm.general_plugins`. From there the way in is the
quantization hook: `quant_method: kvcompress` in config.json makes vLLM ask `quantization.KVCompressConfig` about every
attention layer, and layers that have a codec get what their form's room gives them. Only multi-head latent
attention (`transmla`) needs a model class of our own.
"""

from __future__ import annotations


def register() -> None:
    """Make quantization method and model class known to vLLM. May be called any number of times.

    Raises:
        RuntimeError: this vLLM is outside the supported range.
    """
    from kvcompress import modeling
    from kvcompress.families import LATENT_ARCHITECTURE
    from kvcompress.serving.vllm import compat, metrics

    compat.extend_worker()
    compat.extend_loader()
    metrics.register()
    modeling.register()
    compat.register_model(LATENT_ARCHITECTURE, "kvcompress.serving.vllm.latent.model:KVCompressMLAForCausalLM")
    # Importing the module registers its class under the quantization method's name.
    from kvcompress.serving.vllm import quantization

    assert quantization.KVCompressConfig.get_name() in compat.QUANTIZATION_METHODS
