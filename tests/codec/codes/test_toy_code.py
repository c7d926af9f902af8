"""A code added in this file alone: specs, pages, recipes, budgets, plan, compress and serving need no other change."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kvcompress.checkpoint.manifest import Manifest
from kvcompress.checkpoint.reader import Checkpoint
from kvcompress.codec import scalar
from kvcompress.codec.bands import Band, SideSpec
from kvcompress.codec.blocks import encoding
from kvcompress.codec.blocks.spec import BlockSide, BlocksSpec
from kvcompress.codec.codes import packing
from kvcompress.codec.codes.code import Code
from kvcompress.codec.codes.registry import CODES
from kvcompress.codec.codes.uniform import Uniform
from kvcompress.codec.heads.codec import HeadsCodec
from kvcompress.codec.heads.layout import PageLayout
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.codec.layout import FRAGMENT
from kvcompress.codec.nested import cut_spec
from kvcompress.codec.shared.codec import SharedCodec
from kvcompress.codec.spec import CodecSpec
from kvcompress.methods.scalar import ScalarConfig, side_spec
from kvcompress.ops.blocks import cpu as blocks_cpu
from kvcompress.ops.blocks import cuda as blocks_cuda
from kvcompress.ops.call import Call
from kvcompress.ops.heads import attention, cpu, cuda
from kvcompress.ops.shared import cpu as shared_cpu
from kvcompress.ops.shared import cuda as shared_cuda
from kvcompress.pipeline import plan as planning
from kvcompress.serving.loading import load_codec
from kvcompress.serving.transformers import CompressedCache
from tests import tiny
from tests.compression import compress, listed, recipe

EIGHT = (-2.1519, -1.3439, -0.7560, -0.2451, 0.2451, 0.7560, 1.3439, 2.1519)
"""The eight values of least squared error for a standard normal variable (Max 1960)."""


class Codebook(Code):
    """A code whose values are no equal steps apart."""

    reach: ClassVar[float] = EIGHT[-1]  # type: ignore[misc]

    def encode(self, unit: Tensor) -> Tensor:
        values = torch.tensor(EIGHT)
        return torch.bucketize(unit.contiguous(), (values[1:] + values[:-1]) / 2)

    def decode(self, code: Tensor) -> Tensor:
        return torch.tensor(EIGHT)[code.long()]


@pytest.fixture(
    params=[Uniform(3, 0.5860, 0.03744), Codebook(3, 1.0, 0.03454)], ids=["uniform", "codebook"], autouse=True
)
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Code:
    """Three bits, in the list of codes as long as a test runs."""
    monkeypatch.setitem(CODES, 3, request.param)
    found: Code = request.param
    return found


@pytest.fixture
def mixed() -> SideSpec:
    return SideSpec((Band(8, 8), Band(3, 16), Band(2, 8)), 1)


def test_error_and_bytes_are_what_the_code_says(code: Code) -> None:
    side, latent = SideSpec((Band(3, 64),)), torch.randn(4000, 2, 64, generator=torch.Generator().manual_seed(0))
    record = scalar.encode(latent, torch.ones(2, 64), side)
    assert record.codes_THB.shape[-1] == side.code_bytes == 24
    error = (scalar.decode(record, side) - latent).square().mean().item()
    assert 0.8 * code.expected_error < error < 1.02 * code.expected_error
    clipped = scalar.clips(record, latent, torch.ones(2, 64), side)
    beyond = (latent.abs() - code.reach * record.gain_TH[..., None].float()).clamp_min(0).square().sum(-1)  # type: ignore[index]
    assert torch.equal(clipped, beyond > scalar.CLIP_THRESHOLD * latent.square().sum(-1))


@pytest.mark.parametrize("bits", [1, 3, 5, 6, 7])
def test_a_code_that_crosses_bytes_is_laid_out_by_the_same_rule(bits: int) -> None:
    """Channel c of b bits begins in byte c*b//8 at bit c*b%8."""
    codes = torch.randint(0, 1 << bits, (3, 16), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = packing.pack(codes, bits)
    assert packed.shape == (3, 2 * bits)
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        number = int.from_bytes(bytes(stored), "little")
        assert row == [number >> (channel * bits) & ((1 << bits) - 1) for channel in range(16)]
    assert torch.equal(packing.unpack(packed, bits), codes)


def test_specs_are_written_read_and_cut(mixed: SideSpec) -> None:
    layer = HeadsSpec(2, 32, mixed, SideSpec((Band(3, 8),)))
    assert layer.v.bytes_per_token == 2 + 3
    assert mixed.part_bytes == (2, 2, 1, 8 + 6 + 2)
    spec = CodecSpec((layer, None))
    assert CodecSpec.from_json(spec.to_json()) == spec
    cut: Any = cut_spec(spec, bits=3).layers[0]
    assert cut.k.bands == (Band(3, 24), Band(2, 8))


def test_pages_and_attention_are_torchs(base_model: Path, mixed: SideSpec) -> None:
    layer = HeadsSpec(tiny.NUM_KV_HEADS, tiny.HEAD_DIM, mixed, SideSpec((Band(3, 32),)))
    spec = CodecSpec((layer,) * tiny.NUM_LAYERS)
    codec = tiny.fit_codec(tiny.load_model(base_model), spec)[0]
    assert isinstance(codec, HeadsCodec)
    keys_THD, values_THD = torch.randn(2, 40, 2, 32, generator=torch.Generator().manual_seed(0))
    op = attention.bind(codec, "cpu")
    pages_NHX = torch.zeros(3, 2, PageLayout.of(layer, 16).record_bytes, dtype=torch.uint8)
    op.append(pages_NHX, keys_THD, values_THD, torch.arange(40))
    found = op.read(pages_NHX, torch.arange(3), 40)
    for latent_THR, side, x_THD in zip(found, (codec.k, codec.v), (keys_THD, values_THD), strict=True):
        assert torch.equal(latent_THR, side.decode(side.encode(x_THD)))
    query_THD, output_THD = torch.randn(1, 4, 32), torch.zeros(1, 4, 32)
    op.attend(Call(output_THD, query_THD, torch.arange(3)[None], [0, 1], [40], 0.2), pages_NHX)
    keys, values = (
        torch.einsum("thr,hrd->htd", latent_THR, side.decode_HRD) + side.mean_HD[:, None]
        for latent_THR, side in zip(found, (codec.k, codec.v), strict=True)
    )
    scores = torch.einsum("hgd,htd->hgt", query_THD.view(2, 2, 32), keys) * 0.2
    expected_THD = torch.einsum("hgt,htd->hgd", scores.softmax(-1), values).flatten(0, 1)[None]
    torch.testing.assert_close(output_THD, expected_THD, rtol=1e-4, atol=1e-4)


def test_kernels_leave_what_they_do_not_unpack_to_torch(mixed: SideSpec) -> None:
    four = SideSpec((Band(4, 32),))
    for k, v in ((mixed, four), (four, mixed)):
        layer = HeadsSpec(2, 32, k, v)
        assert not cpu.covers(layer)
        # The library is asked only about layers that are known.
        assert not cuda.covers(None, layer)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="found channels of 3 bits; pages in fragment order hold 16, 8, 4 or 2"):
            PageLayout.of(layer, 64, FRAGMENT)
    assert cpu.covers(HeadsSpec(2, 32, four, four))
    k = BlockSide(64, 32, 4, "tokens", 64, 2, 2, 16)
    v = replace(k, along="channels", group=32)
    assert blocks_cpu.covers(BlocksSpec(2, 32, k, v))
    for layer in (BlocksSpec(2, 32, replace(k, bits=3), v), BlocksSpec(2, 32, k, replace(v, bits=3))):
        assert not blocks_cpu.covers(layer)
        assert not blocks_cuda.covers(layer)


def test_blocks_are_made_of_it() -> None:
    unit_NHSR = torch.randn(2, 2, 64, 32, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in (2, 3, 4):
        side = BlockSide(64, 32, bits, "tokens", 64, 2, 2, 16)
        records_NHB = encoding.encode(unit_NHSR, torch.ones(2, 32), side)
        assert records_NHB.shape[-1] == side.nbytes
        errors.append(float((encoding.decode(records_NHB, side) - unit_NHSR).square().mean()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_a_budget_is_spent_on_it_where_it_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among 2, 3 and 4 bits: of all ways to cost as much, the one of least error."""
    monkeypatch.delitem(CODES, 8)
    energy = [8.0, 4.0, 3.0, 1.0, 0.2]
    variance = [e / 8 for e in energy for _ in range(8)]
    errors = {bits: code.expected_error for bits, code in CODES.items() if code.has_gain} | {0: 1.0}
    seen = set()
    for total in range(2, 21):
        config = ScalarConfig.model_validate(
            {"method": "scalar", "target_bits_per_channel": {"k": total / 5, "v": total / 5}}
        )
        found = side_spec(config, "k", 40, 40, variance)
        best = min(
            (sum(errors[bits] * e for bits, e in zip(chosen, energy, strict=True)), chosen)
            for chosen in itertools.product(errors, repeat=5)
            if sum(chosen) == total
        )
        assert [band.bits for band in found.bands for _ in range(band.width // 8)] == [b for b in best[1] if b], total
        seen |= {band.bits for band in found.bands}
    assert seen == {4, 3, 2}


@pytest.mark.parametrize("parameters", ["bits: 3", "bands: {k: [[4, 8], [3, 16]], v: [[3, 32]]}"])
def test_recipe_plan_compress_and_serve(parameters: str, base_model: Path, tmp_path: Path) -> None:
    model, tokens, differences = tiny.load_model(base_model), torch.tensor(tiny.prompts([50])), {}
    with torch.no_grad():
        base = model(tokens).logits
        for number, stage in enumerate(("bits: 2", parameters, "bits: 4")):
            out, stages = tmp_path / str(number), listed("method: pca", f"method: scalar, {stage}")
            compress(base_model, out, stages)
            cache = CompressedCache.from_pretrained(out)
            differences[stage] = float((model(tokens, past_key_values=cache).logits - base).square().mean())
            per_token = Manifest.load(out).bytes_per_token.compressed
            assert cache.nbytes == 50 * per_token
            assert planning.make(Checkpoint.open(base_model), recipe(stages), "tiny").bytes_per_token == per_token
    assert differences["bits: 4"] < differences[parameters] < differences["bits: 2"]


def test_layers_that_share_a_latent_are_torchs_too(base_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(base_model, out, listed("method: xkv, group: 2, rank: 0.5", "method: scalar, bits: {k: 3, v: 4}"))
    for codec in load_codec(out):
        assert isinstance(codec, SharedCodec)
        assert not shared_cpu.covers(codec)
        assert not shared_cuda.covers(codec)
    cache = CompressedCache.from_pretrained(out)
    with torch.no_grad():
        logits = tiny.load_model(base_model)(torch.tensor(tiny.prompts([50])), past_key_values=cache).logits
    assert torch.isfinite(logits).all()
    assert cache.nbytes == 50 * Manifest.load(out).bytes_per_token.compressed
