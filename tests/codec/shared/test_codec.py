"""Codecs that several layers have in common: rotation and back, bytes and back, and what a description must say."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvcompress.codec.bands import Band, SideSpec
from kvcompress.codec.file import from_tensors, to_tensors
from kvcompress.codec.groups import check_groups
from kvcompress.codec.heads.codec import HeadsCodec, SideCodec
from kvcompress.codec.prompt.codec import PromptCodec, factor
from kvcompress.codec.prompt.spec import PromptSpec
from kvcompress.codec.record import Record
from kvcompress.codec.rope import Rope
from kvcompress.codec.shared.codec import SharedCodec, SharedSide
from kvcompress.codec.shared.pages import SharedLayout
from kvcompress.codec.shared.spec import SharedSpec
from kvcompress.codec.spec import CodecSpec

HEADS, HEAD_DIM, LAYERS = 2, 32, 3
WIDTH = HEADS * HEAD_DIM
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}


def config(rope: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, head_dim=HEAD_DIM, rope_parameters=rope, vocab_size=8
    )


@pytest.mark.parametrize("kind", ROPES)
def test_rotation_is_the_models_and_can_be_undone(kind: str) -> None:
    made = config(ROPES[kind])
    rope, rotary = Rope.of(made), LlamaRotaryEmbedding(made)
    x_THD = torch.randn(50, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    positions_T = torch.arange(100, 150)
    cos, sin = rotary(x_THD, positions_T[None])
    expected = apply_rotary_pos_emb(x_THD.transpose(0, 1)[None], x_THD.transpose(0, 1)[None], cos, sin)[1]
    rotated = rope.rotate(x_THD, positions_T)
    torch.testing.assert_close(rotated, expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rope.unrotate(rotated, positions_T), x_THD, rtol=1e-4, atol=1e-5)
    if kind == "yarn":
        assert float(rope.amplitude_1) != 1.0
    assert rope.same(Rope.of(made))
    torch.set_default_dtype(torch.bfloat16)  # as serving engines do while they build a model
    try:
        assert rope.same(Rope.of(made))
    finally:
        torch.set_default_dtype(torch.float32)
    assert not rope.same(Rope.of(config({"rope_type": "default", "rope_theta": 20000.0})))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_length_are_refused(kind: str) -> None:
    extra = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16} if kind == "longrope" else {}
    made = config(
        {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64, **extra}
    )
    with pytest.raises(ValueError, match=rf"of type {kind}, .* a codec needs one of default"):
        Rope.of(made)


K, V = Band(8, 16), Band(4, 24)


def spec(place: int, share: str = "kv", k: Band = K, v: Band = V, **more: int) -> SharedSpec:
    return SharedSpec(
        HEADS,
        HEAD_DIM,
        (0, 1, 2),
        place,
        share,
        SideSpec((k,)),
        SideSpec((v,)),
        **more,  # type: ignore[arg-type]
    )


def shared_side(place: int, bands: SideSpec, seed: int) -> SharedSide:
    """Layers' parts of one orthogonal basis of the whole group."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.linalg.qr(torch.randn(LAYERS * WIDTH, LAYERS * bands.rank, generator=generator)).Q
    basis = whole.unflatten(0, (LAYERS, HEADS, HEAD_DIM))[place]
    mean = torch.randn(LAYERS, HEADS, HEAD_DIM, generator=generator)[place]
    scale = torch.rand(LAYERS, bands.rank, generator=generator) + 0.5
    return SharedSide(bands, mean, basis.contiguous(), basis.transpose(1, 2).contiguous(), scale)


def own_side(bands: SideSpec, seed: int) -> SideCodec:
    """Keys of one layer by themselves, per head."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(HEADS, HEAD_DIM, bands.rank, generator=generator)).Q
    return SideCodec(bands, torch.zeros(HEADS, HEAD_DIM), basis, basis.mT.contiguous(), torch.ones(HEADS, bands.rank))


def codecs(**options: Any) -> list[SharedCodec]:
    rope = Rope.of(config(ROPES["llama3"]))
    made = []
    for place in range(LAYERS):
        described = spec(place, **options)
        values = shared_side(place, described.v, 2)
        if described.share == "kv":
            made.append(SharedCodec(described, shared_side(place, described.k, 1), values, rope))
        else:
            made.append(SharedCodec(described, own_side(described.k, place), values, None))
    return made


def states(seed: int = 3) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, LAYERS, 40, HEADS, HEAD_DIM, generator=generator)
    return list(keys), list(values)


@pytest.mark.parametrize("share", ["kv", "v"])
def test_written_and_read_back(share: str) -> None:
    made = codecs(share=share)
    described = CodecSpec(tuple(codec.spec for codec in made))
    again = from_tensors(CodecSpec.from_json(json.loads(json.dumps(described.to_json()))), to_tensors(made))
    keys, values = states()
    positions = torch.arange(7, 47)
    for one, other in zip(
        SharedCodec.round_trip(made, keys, values, positions),
        SharedCodec.round_trip(again, keys, values, positions),  # type: ignore[arg-type]
        strict=True,
    ):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def test_full_rank_in_sixteen_bits_loses_a_rounding() -> None:
    made = codecs(k=Band(16, WIDTH), v=Band(16, WIDTH))
    keys, values = states()
    read = SharedCodec.round_trip(made, keys, values, torch.arange(40))
    for (k, v), key, value in zip(read, keys, values, strict=True):
        assert (k - key).abs().max() < 2e-3
        assert (v - value).abs().max() < 2e-3


def test_latent_is_the_sum_of_the_layers_parts() -> None:
    """With everything in one matrix: joined states less means, times the joined basis, and back."""
    made = codecs(v=Band(16, 24))
    _, values = states()
    sides = [codec.v for codec in made]
    joined = torch.cat([(x - s.mean_HD).flatten(1) for x, s in zip(values, sides, strict=True)], dim=1)
    basis = torch.cat([s.basis_HDR.flatten(0, 1) for s in sides])
    expected = joined @ basis @ basis.T
    read = SharedCodec.round_trip(made, *states(), torch.arange(40))
    found = torch.cat([(v - s.mean_HD).flatten(1) for (_, v), s in zip(read, sides, strict=True)], dim=1)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_pages_give_back_what_was_written() -> None:
    described = spec(1, share="v")
    layout = SharedLayout.of(described, 16)
    assert layout.page_bytes == 16 * described.bytes_per_token
    pages = torch.full((6, 2, layout.page_bytes), 0xA5, dtype=torch.uint8)[:, 0]
    generator = torch.Generator().manual_seed(0)
    blocks = torch.tensor([4, 1])
    slots = torch.tensor([*(4 * 16 + i for i in range(16)), *(16 + i for i in range(5)), -1])
    written = []
    for side, heads, size in ((layout.k, HEADS, 16), (layout.v, 1, 12)):
        gain = torch.rand(22, heads, generator=generator).half()
        codes = torch.randint(0, 256, (22, heads, size), dtype=torch.uint8, generator=generator)
        side.write(pages, Record(gain, codes), slots)
        written.append((side, gain[:21], codes[:21]))
    for side, gain, codes in written:
        found = side.read(pages, blocks, 21)
        assert torch.equal(found.gain_TH, gain)
        assert torch.equal(found.codes_THB, codes)
    with pytest.raises(ValueError, match="positive multiple of 16"):
        SharedLayout.of(described, 24)


def test_groups_must_be_whole_and_agree() -> None:
    whole = [spec(0), spec(1), spec(2)]
    check_groups([*whole, None])
    for broken in (whole[:2], [whole[0], None, whole[2]], [whole[0], spec(1, v=Band(8, 24)), whole[2]], [spec(1)] * 3):
        with pytest.raises(ValueError, match="does not fit its group"):
            check_groups(broken)
    own_keys = [spec(0, "v"), spec(1, "v", k=Band(4, 8)), spec(2, "v")]
    check_groups(own_keys)  # keys with bases of their own may differ
    for wrong in ({"group": (1, 0)}, {"place": 3}, {"share": "k"}, {"sink": -1}, {"v": SideSpec((Band(8, 72),))}):
        with pytest.raises(ValueError, match=r"found|keeps"):
            replace(whole[0], **wrong)


def test_only_all_heads_can_be_had() -> None:
    codec = codecs()[0]
    assert codec.heads(0, HEADS) is codec
    with pytest.raises(ValueError, match="cannot be divided among tensor-parallel ranks"):
        codec.heads(0, 1)
    assert not isinstance(codec, HeadsCodec)


def test_prompt_factors_are_the_truncated_svd() -> None:
    keys, _ = states()
    common, own = factor([x.flatten(1) for x in keys], 20)
    joined = torch.cat([x.flatten(1) for x in keys], dim=1)
    error = (torch.cat([common @ part for part in own], dim=1) - joined).norm()
    assert float(error) == pytest.approx(float(torch.linalg.svdvals(joined)[20:].square().sum().sqrt()), rel=1e-5)
    assert factor([keys[0].flatten(1)[:5]], 20)[0].shape == (5, 5)


def test_prompt_keeps_sink_and_recent_tokens() -> None:
    described = [PromptSpec(HEADS, HEAD_DIM, (0, 1, 2), place, "kv", 4, 4, 4, sink=2, recent=3) for place in range(3)]
    rope = Rope.of(config(ROPES["default"]))
    made = [PromptCodec(one, rope) for one in described]
    again = from_tensors(CodecSpec.from_json(CodecSpec(tuple(described)).to_json()), to_tensors(made))
    keys, values = states()
    for (k, v), key, value in zip(
        PromptCodec.round_trip(again, keys, values, torch.arange(40)),
        keys,
        values,
        strict=True,  # type: ignore[arg-type]
    ):
        for found, exact in ((k, key), (v, value)):
            assert torch.equal(found[:2], exact[:2])
            assert torch.equal(found[-3:], exact[-3:])
            assert not torch.allclose(found[2:-3], exact[2:-3], atol=0.1)
