"""Weights in 8 bits: the arithmetic against the formats' definitions, element by element, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvcompress.checkpoint.quantized import base_section, check_base, check_section, dequantize, read_weight
from kvcompress.checkpoint.reader import Checkpoint
from tests import quantize, tiny

BLOCKS = quantize.FP8 | {"weight_block_size": [48, 80]}


def e4m3(byte: int) -> float:
    """Sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no infinities."""
    sign, exponent, mantissa = (-1) ** (byte >> 7), byte >> 3 & 15, byte & 7
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


def element(stored: Tensor, scale: float, row: int, column: int) -> float:
    value = stored[row, column]
    number = float(int(value)) if stored.dtype == torch.int8 else e4m3(int(value.view(torch.uint8)))
    return number * scale


def random_weight(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, inputs)


@pytest.mark.parametrize(
    ("quantizer", "block", "scale_at"),
    [
        (quantize.int8, None, lambda scale, row, column: scale[row, 0]),
        (quantize.fp8, None, lambda scale, row, column: scale),
        (quantize.fp8_blocks(4, 3), (4, 3), lambda scale, row, column: scale[row // 4, column // 3]),
        (quantize.fp8_blocks(10, 3), (10, 3), lambda scale, row, column: scale[0, column // 3]),
    ],
    ids=["int8 per output", "fp8 per tensor", "fp8 blocks, cut at both edges", "one row of blocks"],
)
def test_elements(
    quantizer: quantize.Quantizer,
    block: tuple[int, int] | None,
    scale_at: Callable[[Tensor, int, int], Tensor],
) -> None:
    weight = random_weight(10, 7)
    stored, scale = quantizer(weight).values()
    found = dequantize("w", stored, scale, block)
    assert found.dtype == torch.float32
    for row in range(10):
        for column in range(7):
            wanted = element(stored, float(scale_at(scale, row, column)), row, column)
            assert float(found[row, column]) == pytest.approx(wanted, rel=1e-6)
    assert (found - weight).abs().max() <= weight.abs().max() / 16


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (10,), (10, 1)])
def test_shapes_of_scales(shape: tuple[int, ...]) -> None:
    stored = torch.arange(70, dtype=torch.int8).reshape(10, 7)
    scale = torch.rand(shape, dtype=torch.bfloat16)
    expected = stored.double() * (scale.double() if scale.numel() == 1 else scale.double().reshape(10, 1))
    assert torch.allclose(dequantize("w", stored, scale, None).double(), expected, rtol=1e-6)


@pytest.mark.parametrize(("shape", "block"), [((7,), None), ((3, 3), None), ((2, 3), (4, 3)), ((1, 7), None)])
def test_scales_that_do_not_fit_are_named(shape: tuple[int, ...], block: tuple[int, int] | None) -> None:
    with pytest.raises(ValueError, match=r"'w' of shape \[10, 7\] has scales of shape .*; expected one number or one"):
        dequantize("w", torch.zeros(10, 7, dtype=torch.int8), torch.ones(shape), block)


def group(**weights: Any) -> dict[str, Any]:
    section = copy.deepcopy(quantize.int8_config())
    section["config_groups"]["group_0"]["weights"] |= weights
    return section


@pytest.mark.parametrize(
    "section",
    [
        quantize.FP8,
        BLOCKS,
        quantize.int8_config(quantize.PER_TOKEN) | {"sparsity_config": {}, "quant_method": "compressed_tensors"},
        group(strategy="tensor"),
        group(type="float", strategy="block", block_structure=[128, 128]) | {"format": "float-quantized"},
    ],
)
def test_supported(section: dict[str, Any]) -> None:
    check_section(section)


@pytest.mark.parametrize(
    ("section", "found"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method awq"),
        ({"producer": {"name": "modelopt"}}, "quant_method None"),
        (quantize.FP8 | {"scale_fmt": "ue8m0"}, "fp8 with scale_fmt ue8m0"),
        (quantize.FP8 | {"fmt": "e5m2"}, "fp8 with fmt e5m2"),
        (quantize.FP8 | {"weight_block_size": [128]}, r"fp8 with blocks of \[128\]"),
        (quantize.int8_config() | {"format": "pack-quantized"}, "compressed-tensors format pack-quantized"),
        (quantize.int8_config() | {"config_groups": {}}, "compressed-tensors without config_groups"),
        (quantize.int8_config() | {"transform_config": {"R1": {}}}, "compressed-tensors with a transform_config"),
        (quantize.int8_config() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "with a sparsity_config"),
        (group(num_bits=4), "format int-quantized with 4-bit int weights"),
        (group(type="float"), "format int-quantized with 8-bit float weights"),
        (group(symmetric=False), "int-quantized with asymmetric weights"),
        (group(strategy="group", group_size=32), "int-quantized with weights scaled per group"),
    ],
)
def test_other_formats_are_refused(section: dict[str, Any], found: str) -> None:
    with pytest.raises(
        ValueError, match=rf"found .*{found}; supported are fp8 .*; compress a checkpoint of such a kind"
    ):
        check_section(section)


@pytest.mark.parametrize("base", [quantize.FP8, quantize.int8_config()])
@pytest.mark.parametrize(
    "cache", [{"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, {"kv_cache_quant_algo": "FP8"}]
)
def test_a_quantized_cache_is_refused(base: dict[str, Any], cache: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"quantizes the KV cache too \({next(iter(cache))}\).* set .* to null"):
        check_section(base | cache)


def test_reading_through_a_checkpoint(base_model: Path, tmp_path: Path) -> None:
    folder = quantize.save(base_model, tmp_path / "q", quantize.fp8_blocks(48, 80), BLOCKS)
    checkpoint, tensors = Checkpoint.open(folder), load_file(base_model / "model.safetensors")
    assert check_base(checkpoint)
    assert base_section(checkpoint.config) == BLOCKS
    name = "model.layers.1.mlp.down_proj.weight"
    found = read_weight(checkpoint, name, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert 0 < (found.float() - tensors[name]).norm() / tensors[name].norm() < 0.04
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(read_weight(checkpoint, norm, torch.bfloat16), tensors[norm]), "as stored"


def test_an_ordinary_checkpoint_is_not_quantized(base_model: Path) -> None:
    checkpoint = Checkpoint.open(base_model)
    assert not check_base(checkpoint)
    assert base_section(checkpoint.config) is None


def test_a_section_that_is_no_object(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "base")
    quantize.edit_config(folder, quantization_config=["fp8"])
    with pytest.raises(ValueError, match="quantization_config that is not an object"):
        check_base(Checkpoint.open(folder))


def drop_scale(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.2.mlp.up_proj.weight_scale"]


def shorten_scale(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight_scale"] = torch.ones(7)


def store_embedding(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(torch.int8)


def store_bytes(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"].view(torch.uint8)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop_scale, r"'model.layers.2.mlp.up_proj.weight' is stored as I8 without a weight_scale"),
        (shorten_scale, r"'model.layers.2.mlp.up_proj.weight' of shape \[256, 128\] has scales of shape \[7\]"),
        (store_embedding, r"found 'model.embed_tokens.weight' stored as I8"),
        (store_bytes, r"found 'model.layers.2.mlp.up_proj.weight' stored as U8"),
    ],
)
def test_tensors_that_do_not_fit_config_json(
    change: Callable[[dict[str, Tensor]], None], reason: str, tmp_path: Path
) -> None:
    folder = quantize.save(tiny.save_model(tmp_path / "base"), tmp_path / "q", quantize.int8, quantize.int8_config())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=reason):
        check_base(Checkpoint.open(folder))


def test_config_json_must_say_what_the_tensors_are(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base")
    folder = quantize.save(base, tmp_path / "q", quantize.fp8, quantize.FP8)
    quantize.edit_config(folder, quantization_config=None)
    with pytest.raises(ValueError, match=r"is stored as F8_E4M3 and config\.json has no quantization_config"):
        check_base(Checkpoint.open(folder))
    quantize.edit_config(base, quantization_config=quantize.FP8)
    with pytest.raises(ValueError, match=r"says that weights are quantized \(fp8\) and no tensor is"):
        check_base(Checkpoint.open(base))
