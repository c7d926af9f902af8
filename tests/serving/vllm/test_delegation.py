"""A base model's own quantization beneath ours: vLLM's config for it is made, and asked what does not concern us."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from tests import quantize, require, tiny

require.need("vllm")

from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod

from kvcompress.serving.vllm.quantization import KVCompressConfig

BLOCKS = quantize.FP8 | {"weight_block_size": [128, 128], "modules_to_not_convert": ["model.layers.1.mlp.down_proj"]}
W8A8 = quantize.int8_config(quantize.PER_TOKEN)


def config_of(base: dict[str, Any] | None) -> KVCompressConfig:
    section = {"quant_method": "kvcompress", "version": 2, "codec": tiny.mixed_spec().to_json()}
    return KVCompressConfig.from_config(section if base is None else section | {"base": base})


def method_of(config: KVCompressConfig, prefix: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a linear layer of that name is given; float8 itself needs a device that this test may not have."""
    monkeypatch.setattr(Fp8LinearMethod, "__init__", lambda self, quant_config: None)
    engine = VllmConfig(device_config=DeviceConfig(device="cpu"))
    with set_current_vllm_config(engine):
        layer = ReplicatedLinear.__new__(ReplicatedLinear)
        torch.nn.Module.__init__(layer)
        return config.get_quant_method(layer, prefix)


def test_without_a_base_nothing_is_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(None)
    assert isinstance(method_of(config, "model.layers.0.mlp.down_proj", monkeypatch), UnquantizedLinearMethod)
    assert config.get_quant_method(torch.nn.Module(), "lm_head") is None
    assert config.get_min_capability() == 0
    assert config.get_supported_act_dtypes() == [torch.float16, torch.bfloat16, torch.float32]
    assert not hasattr(config, "weight_block_size")


def test_linear_layers_are_the_base_s(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(BLOCKS)
    assert isinstance(config.base, Fp8Config)
    assert isinstance(method_of(config, "model.layers.0.mlp.down_proj", monkeypatch), Fp8LinearMethod)
    assert isinstance(method_of(config, "model.layers.1.mlp.down_proj", monkeypatch), UnquantizedLinearMethod)
    config = config_of(W8A8)
    assert isinstance(config.base, CompressedTensorsConfig)
    assert isinstance(method_of(config, "model.layers.0.mlp.down_proj", monkeypatch), CompressedTensorsLinearMethod)
    assert isinstance(method_of(config, "lm_head", monkeypatch), UnquantizedLinearMethod)


def test_merged_layers_are_known_to_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM tells us how it merges; all parts are left out, so the merged layer is."""
    parts = ["q_proj", "k_proj", "v_proj"]
    config = config_of(quantize.FP8 | {"ignored_layers": [f"model.layers.0.self_attn.{part}" for part in parts]})
    config.packed_modules_mapping = {"qkv_proj": parts}
    assert isinstance(method_of(config, "model.layers.0.self_attn.qkv_proj", monkeypatch), UnquantizedLinearMethod)
    assert isinstance(method_of(config, "model.layers.1.self_attn.qkv_proj", monkeypatch), Fp8LinearMethod)


def test_what_the_engine_asks_and_sets() -> None:
    fp8, int8 = config_of(BLOCKS), config_of(W8A8)
    assert fp8.get_name() == "kvcompress"
    assert fp8.get_min_capability() == Fp8Config.get_min_capability() > 0
    assert fp8.get_supported_act_dtypes() == [torch.float16, torch.bfloat16], "float8 kernels take no float32"
    assert torch.float32 in int8.get_supported_act_dtypes()
    assert fp8.weight_block_size == [128, 128]
    assert not int8.has_blocked_weights()
    assert fp8.get_cache_scale_mapper().orig_to_new_suffix[".k_proj.output_scale"] == ".attn.k_scale"
    assert fp8.use_deep_gemm is None
    fp8.use_deep_gemm = False
    fp8.base_method(torch.nn.Module(), "model.norm")
    assert fp8.base.use_deep_gemm is False


def test_names_are_mapped_for_the_base() -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    config = config_of(BLOCKS)
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.base.ignored_layers == ["language_model.model.layers.1.mlp.down_proj"]


def test_travels_to_the_workers() -> None:
    copy = pickle.loads(pickle.dumps(config_of(W8A8)))
    assert isinstance(copy.base, CompressedTensorsConfig)
    assert copy.base.target_scheme_map.keys() == {"Linear"}


def test_config_json_is_left_as_it_was() -> None:
    section = quantize.int8_config(quantize.PER_TOKEN)
    config_of(section)
    assert section == W8A8


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (W8A8 | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, r"quantizes the KV cache too \(kv_cache_scheme"),
        ({"quant_method": "awq"}, "found quant_method awq"),
        (quantize.int8_config(), r"does not serve the base model's own quantization \(compressed-tensors\)"),
        (BLOCKS | {"activation_scheme": "static"}, r"does not serve .* \(fp8\): The block-wise quantization only"),
    ],
)
def test_refusals(base: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        config_of(base)
