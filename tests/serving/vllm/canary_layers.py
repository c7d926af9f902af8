"""Attention layers of every cache form, outside an engine, with real-looking activations and a statement."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from kvcompress import forms
from kvcompress.codec import canary
from kvcompress.codec.bands import Band, SideSpec
from kvcompress.codec.blocks.codec import BlocksCodec, BlockSideCodec
from kvcompress.codec.blocks.spec import Axis
from kvcompress.codec.groups import Share
from kvcompress.codec.heads.codec import HeadsCodec, SideCodec
from kvcompress.codec.latent.codec import LatentCodec
from kvcompress.codec.latent.spec import LatentSpec
from kvcompress.codec.rope import Rope
from kvcompress.codec.shared.codec import SharedCodec, SharedSide
from kvcompress.codec.shared.spec import SharedSpec
from kvcompress.serving.vllm import compat
from kvcompress.serving.vllm.canary_reference import Inputs
from kvcompress.serving.vllm.latent import LatentImpl
from kvcompress.serving.vllm.served import Served
from tests.codec.blocks import cases as gear_cases
from tests.serving.vllm import engines

HEADS, KV_HEADS, HEAD_DIM, BLOCK, NUM_BLOCKS = 6, 2, 32, 32, 12
SCALE = HEAD_DIM**-0.5
TOKENS = canary.PROMPT_TOKENS
FORMS = ("heads", "blocks", "shared", "shared values", "latent")
K_BANDS, V_BANDS = (Band(8, 16), Band(4, 8)), (Band(8, 8), Band(4, 16), Band(2, 8))


def activations(seed: int, heads: int = KV_HEADS, channels: int = HEAD_DIM) -> Inputs:
    """Keys and values with a mean, and channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    query_THD = 2 * torch.randn(TOKENS, HEADS, channels, generator=generator)
    size_D = torch.logspace(0.5, -1, channels)
    sides = []
    for _ in range(2):
        mixing_HDD = torch.linalg.qr(torch.randn(heads, channels, channels, generator=generator)).Q
        mean_HD = torch.randn(heads, channels, generator=generator)
        drawn_THD = torch.randn(TOKENS, heads, channels, generator=generator) * size_D
        sides.append(torch.einsum("thd,hde->the", drawn_THD, mixing_HDD) + mean_HD)
    return Inputs(query_THD, *sides)


def fitted(x_THD: Tensor, bands: tuple[Band, ...], outliers: int = 0) -> SideCodec:
    """Principal components of what it is to encode."""
    spec = SideSpec(bands, outliers)
    mean_HD = x_THD.mean(0)
    centred_HTD = (x_THD - mean_HD).transpose(0, 1)
    variance_HD, vectors_HDD = torch.linalg.eigh(centred_HTD.mT @ centred_HTD / x_THD.shape[0])
    basis_HDR = vectors_HDD.flip(-1)[..., : spec.rank].contiguous()
    scale_HR = variance_HD.flip(-1)[..., : spec.rank].clamp_min(1e-8).sqrt().contiguous()
    return SideCodec(spec, mean_HD, basis_HDR, basis_HDR.mT.contiguous(), scale_HR)


def in_blocks(x_THD: Tensor, along: Axis) -> BlockSideCodec:
    """The same for blocks of tokens."""
    codec, spec = fitted(x_THD, (Band(4, 24),)), gear_cases.side(along, bits=4, rank=24)
    return BlockSideCodec(spec, codec.mean_HD, codec.basis_HDR, codec.inverse_HRD, codec.scale_HR)


def make(form: str, stated: bool = True) -> tuple[list[Served], list[Inputs]]:
    """The layers of one group (of one layer, where layers do not share), and what they are given."""
    if form == "latent":
        given = activations(0, 1)
        value_THD = given.key_THD[..., :24].contiguous()
        codec, layer = LatentCodec(LatentSpec(HEAD_DIM, 24, 4)), engines.layer(HEADS, 1, HEAD_DIM)
        layer.module.impl = LatentImpl(HEADS, HEAD_DIM, SCALE, 1, codec=codec, engine=engines.engine())
        layer.module.kv_cache = torch.zeros(NUM_BLOCKS, 1, BLOCK, HEAD_DIM)
        return [Served(0, layer, codec)], [Inputs(given.query_THD, given.key_THD, value_THD)]
    inputs = [activations(seed) for seed in range(3 if form.startswith("shared") else 1)]
    if form == "heads":
        codecs: list[Any] = [HeadsCodec(fitted(inputs[0].key_THD, K_BANDS), fitted(inputs[0].value_THD, V_BANDS, 1))]
    elif form == "blocks":
        given = inputs[0]
        codecs = [BlocksCodec(in_blocks(given.key_THD, "tokens"), in_blocks(given.value_THD, "channels"))]
    else:
        codecs = shared_codecs("v" if form == "shared values" else "kv", inputs)
    statements: list[Any] = canary.state(
        codecs, [given.key_THD for given in inputs], [given.value_THD for given in inputs]
    )
    members: list[Any] = []
    return [
        Served(index, attention_layer(index, codec, members), codec, statement if stated else None)
        for index, (codec, statement) in enumerate(zip(codecs, statements, strict=True))
    ], inputs


def attention_layer(index: int, codec: Any, members: list[Any]) -> compat.Layer:
    """A layer with its implementation, and a cache in which another layer's page lies between two of its own."""
    engine = engines.engine(text_config=LlamaConfig(head_dim=HEAD_DIM, rope_theta=1e4))
    layer = engines.layer(HEADS, KV_HEADS, HEAD_DIM, index)
    forms.FORMS[codec.spec.form].serving("vllm").attach(layer, codec, engine, members)
    for ring in engine.config.compilation_config.static_forward_context.values():
        ring.kv_cache = torch.full((NUM_BLOCKS, KV_HEADS, 1, 2 * ring.tokens * HEAD_DIM), torch.nan)
    layer.module.kv_cache = pages(layer)[:, 0]
    layer.impl.use_codec(codec, torch.device("cpu"), 512)
    return layer


def pages(layer: compat.Layer, blocks: int = NUM_BLOCKS, block_size: int = BLOCK, content: int = 0xA5) -> Tensor:
    """Pages of two layers, one of each in a block."""
    spec = layer.module.get_kv_cache_spec(SimpleNamespace(cache_config=SimpleNamespace(block_size=block_size)))
    shape = (blocks, 2, spec.num_kv_heads, block_size, spec.page_size_bytes // spec.num_kv_heads // block_size)
    return torch.full(shape, content, dtype=torch.uint8)


def shared_codecs(share: Share, inputs: list[Inputs]) -> list[SharedCodec]:
    """Orthonormal bases of all layers' channels together; scales as calibrated on the inputs."""
    rope = Rope(1e4 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)), torch.ones(1))
    width, layers = KV_HEADS * HEAD_DIM, len(inputs)
    side = SideSpec((Band(8, 16), Band(4, 16)))
    rank = layers * side.rank
    positions_T = torch.arange(TOKENS)
    shared: dict[str, list[SharedSide]] = {}
    for seed, name in enumerate("kv"):
        states = [rope.unrotate(given.key_THD, positions_T) if name == "k" else given.value_THD for given in inputs]
        generator = torch.Generator().manual_seed(seed)
        basis_LHDR = torch.linalg.qr(torch.randn(layers * width, rank, generator=generator)).Q.unflatten(
            0, (layers, KV_HEADS, HEAD_DIM)
        )
        means = [x_THD.mean(0) for x_THD in states]
        latent_TR = sum(
            torch.einsum("thd,hdr->tr", x_THD - mean_HD, basis_HDR)
            for x_THD, mean_HD, basis_HDR in zip(states, means, basis_LHDR, strict=True)
        )
        assert isinstance(latent_TR, Tensor)
        scale_WR = latent_TR.std(0).unflatten(0, (layers, side.rank))
        shared[name] = [
            SharedSide(side, mean_HD, basis_HDR.contiguous(), basis_HDR.transpose(1, 2).contiguous(), scale_WR)
            for mean_HD, basis_HDR in zip(means, basis_LHDR, strict=True)
        ]
    codecs = []
    for place in range(layers):
        keys: Any = shared["k"][place] if share == "kv" else fitted(inputs[place].key_THD, K_BANDS)
        spec = SharedSpec(KV_HEADS, HEAD_DIM, tuple(range(layers)), place, share, keys.spec, side)
        codecs.append(SharedCodec(spec, keys, shared["v"][place], rope if share == "kv" else None))
    return codecs


def without_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers find their metadata where the canary puts it."""
    current: dict[str, Any] = {}

    @contextmanager
    def running(engine: Any, metadata: dict[str, Any], tokens: int) -> Any:
        current.update(metadata)
        yield

    monkeypatch.setattr(compat, "running", running)
    monkeypatch.setattr(compat, "layer_metadata", current.__getitem__)
