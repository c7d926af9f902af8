"""Base models whose weights are quantized: planned, compressed, verified, loaded by transformers, decompressed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvcompress.calibration.capture import LayerRunner
from kvcompress.checkpoint.manifest import Manifest
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.checkpoint.verify import verify
from kvcompress.pipeline import plan as planning
from kvcompress.pipeline.decompress import decompress
from kvcompress.serving.transformers import CompressedCache, prepare
from tests import quantize, tiny
from tests.compression import compress, recipe

FORMATS: dict[str, tuple[quantize.Quantizer, dict[str, Any]]] = {
    "int8": (quantize.int8, quantize.int8_config()),
    "fp8": (quantize.fp8, quantize.FP8),
    "fp8 blocks": (quantize.fp8_blocks(48, 80), quantize.FP8 | {"weight_block_size": [48, 80]}),
}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", params=FORMATS)
def base(request: pytest.FixtureRequest, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize.save(base_model, tmp_path_factory.mktemp("quantized") / "base", *FORMATS[request.param])


@pytest.fixture(scope="module")
def compressed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "out"
    compress(base, out)
    return out


def section(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def dense(folder: Path) -> dict[str, Tensor]:
    """The weights as numbers, by the rule of the format that the scale's shape tells."""
    tensors = load_file(folder / WEIGHTS)
    found = {}
    for name, tensor in tensors.items():
        scale = next((tensors[name + end] for end in ("_scale", "_scale_inv") if name + end in tensors), None)
        if scale is None:
            found[name] = tensor
        elif name.endswith(".weight"):
            if scale.dim() == 2 and scale.shape[1] > 1:
                rows, columns = (
                    torch.arange(size) // block for size, block in zip(tensor.shape, (48, 80), strict=True)
                )
                scale = scale[rows][:, columns]
            found[name] = tensor.float() * scale
    return {name: tensor for name, tensor in found.items() if "_scale" not in name}


def test_weights_are_kept_byte_for_byte(base: Path, compressed: Path) -> None:
    assert verify(compressed).ok
    assert (compressed / WEIGHTS).read_bytes() == (base / WEIGHTS).read_bytes()
    written = section(compressed)
    assert {key: written[key] for key in ("quant_method", "version", "base")} == {
        "quant_method": "kvcompress",
        "version": 2,
        "base": section(base),
    }
    assert section(base)["quant_method"] in (compressed / "README.md").read_text()


def test_plan_counts_the_bytes_that_are_there(base: Path, base_model: Path, compressed: Path) -> None:
    made = planning.make(Checkpoint.open(base), recipe(), str(base))
    plain = planning.make(Checkpoint.open(base_model), recipe(), str(base_model))
    assert made.bytes_per_token == plain.bytes_per_token == Manifest.load(compressed).bytes_per_token.compressed
    assert made.weights_bytes == Checkpoint.open(base).weights_bytes < plain.weights_bytes
    assert made.peak_rss_bytes > plain.peak_rss_bytes, "the largest layer is there in 8 bits and in float32"


def test_decompress_gives_the_base_model_back(base: Path, compressed: Path, tmp_path: Path) -> None:
    decompress(compressed, tmp_path / "plain", lambda *_: None)
    assert (tmp_path / "plain" / WEIGHTS).read_bytes() == (base / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / "plain/config.json").read_text()) == json.loads((base / "config.json").read_text())


def test_calibration_sees_the_weights_as_numbers(base: Path) -> None:
    weights = dense(base)
    runner = LayerRunner(Checkpoint.open(base), "cpu", torch.float32)
    with runner.layer(2) as layer:
        for name, parameter in layer.state_dict().items():
            assert torch.allclose(parameter, weights[f"model.layers.2.{name}"], rtol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_runs_the_weights_as_numbers(dtype: torch.dtype, base: Path, compressed: Path) -> None:
    import transformers

    tiny.load_model(compressed)  # registers
    model = transformers.AutoModelForCausalLM.from_pretrained(compressed, dtype=dtype)
    found, expected = model.state_dict(), dense(base)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.allclose(found[name].float(), tensor.to(dtype).float(), rtol=1e-6), name
    assert all(parameter.requires_grad for parameter in model.parameters()), "as of any other model"
    tokens = torch.tensor(tiny.prompts([60]))
    cache = CompressedCache.from_pretrained(compressed)
    prepare(model, cache)
    with torch.no_grad():
        assert model(tokens, past_key_values=cache).logits.isfinite().all()


def test_the_model_without_its_head(compressed: Path) -> None:
    import transformers

    whole = tiny.load_model(compressed).model.state_dict()
    body = transformers.AutoModel.from_pretrained(compressed, dtype=torch.float32).state_dict()
    assert body.keys() == whole.keys()
    assert all(torch.equal(body[name], tensor) for name, tensor in whole.items())


def test_a_loaded_model_is_saved_as_an_ordinary_one(compressed: Path, tmp_path: Path) -> None:
    model = tiny.load_model(compressed)
    model.save_pretrained(tmp_path / "saved")
    assert "base" not in section(tmp_path / "saved")
    again = tiny.load_model(tmp_path / "saved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_thirty_two_bits_at_full_rank_are_the_base_model(base: Path, tmp_path: Path) -> None:
    compress(base, tmp_path / "out", "  - method: pca\n    metric: none\n  - method: scalar\n    bits: 32\n")
    model, tokens = tiny.load_model(tmp_path / "out"), torch.tensor(tiny.prompts([120]))
    with torch.no_grad():
        plain = model(tokens).logits
        ours = model(tokens, past_key_values=CompressedCache.from_pretrained(tmp_path / "out")).logits
    assert (plain - ours).abs().max() <= 1e-3


@pytest.mark.parametrize(
    "stages", ["  - method: gear\n", "  - method: xkv\n    group: 2\n  - method: scalar\n    bits: 4\n"]
)
def test_other_cache_methods(stages: str, base_model: Path, tmp_path: Path) -> None:
    base = quantize.save(base_model, tmp_path / "base", *FORMATS["int8"])
    compress(base, tmp_path / "out", stages)
    assert verify(tmp_path / "out").ok
    assert all(0 < layer["relative_error"] < 1 for layer in Manifest.load(tmp_path / "out").layers)


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        ("  - method: fwsvd\n", "fwsvd changes the weights"),
        ("  - method: transmla\n", "transmla changes the weights"),
        ("  - method: fwsvd\n  - method: heal\n", "fwsvd changes the weights"),
        ("  - method: matryoshka\n", "matryoshka trains on the whole model"),
    ],
)
def test_methods_that_need_the_weights_are_refused(stages: str, reason: str, base: Path) -> None:
    with pytest.raises(ValueError, match=rf"{reason}, and the weights of the base model are quantized; .*pca, xkv"):
        planning.make(Checkpoint.open(base), recipe(stages), str(base))
