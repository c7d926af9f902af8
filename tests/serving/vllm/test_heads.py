"""The attention implementation on pages as vLLM hands them over, against attention on the decoded keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress.codec.bands import Band, SideSpec
from kvcompress.codec.heads import attention
from kvcompress.codec.heads.codec import HeadsCodec, SideCodec
from kvcompress.ops import call, library
from tests import require

require.need("vllm")

from kvcompress.serving.vllm.heads import HeadsBackend, HeadsImpl, cache_spec
from kvcompress.serving.vllm.metadata import HostBuilder, Step
from tests.serving.vllm import engines

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 6, 2, 32, 16
SCALE = HEAD_DIM**-0.5
NUM_BLOCKS = 40


def side(bands: tuple[Band, ...], seed: int) -> SideCodec:
    generator = torch.Generator().manual_seed(seed)
    spec = SideSpec(bands)
    basis = torch.linalg.qr(torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM, generator=generator)).Q[..., : spec.rank]
    mean = 0.3 * torch.randn(KV_HEADS, HEAD_DIM, generator=generator)
    return SideCodec(spec, mean, basis, basis.mT.contiguous(), torch.ones(KV_HEADS, spec.rank))


@pytest.fixture(params=["torch", "compiled"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything is tested on the compiled kernels and on the torch code they replace."""
    if request.param == "torch":
        monkeypatch.setattr(library, "load", lambda: None)
    else:
        require.need("kernels")
    return str(request.param)


@pytest.fixture
def codec() -> HeadsCodec:
    return HeadsCodec(side((Band(8, 16), Band(4, 8)), 1), side((Band(8, 8), Band(4, 16), Band(2, 8)), 2))


class Engine:
    """Block tables, slots and metadata for a few requests, as vLLM's runner makes them."""

    def __init__(self, codec: HeadsCodec, dtype: torch.dtype = torch.float32) -> None:
        self.codec = codec
        self.impl = HeadsImpl(HEADS, HEAD_DIM, SCALE, KV_HEADS)
        self.impl.use_codec(codec, torch.device("cpu"), 512)
        content = cache_spec(codec.spec, BLOCK).state_content_size_bytes
        # Another layer's page lies between two of ours, as in vLLM's block-outermost layout; no block starts as zeros.
        packed = torch.full((NUM_BLOCKS, 2, KV_HEADS, BLOCK, content), 0xA5, dtype=torch.uint8)
        self.cache, self.other = packed[:, 0], packed[:, 1]
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(3)
        self.tables = torch.randperm(NUM_BLOCKS, generator=self.generator).reshape(4, -1)
        self.history: dict[int, tuple[Tensor, Tensor]] = {}

    def step(self, new_tokens: dict[int, int], padding: int = 0) -> tuple[Tensor, Tensor]:
        """Run one step with so many new tokens of each request; returns queries and outputs, padding included."""
        total = sum(new_tokens.values())
        query, key, value = (
            torch.randn(total + padding, heads, HEAD_DIM, generator=self.generator).to(self.dtype)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        slots, lengths, start = [], [], 0
        for request, count in new_tokens.items():
            old_key, old_value = self.history.get(request, (key[:0], value[:0]))
            positions = torch.arange(len(old_key), len(old_key) + count)
            slots.append(self.tables[request][positions // BLOCK] * BLOCK + positions % BLOCK)
            grown = (
                torch.cat([old_key, key[start : start + count]]),
                torch.cat([old_value, value[start : start + count]]),
            )
            self.history[request] = grown
            lengths.append(len(grown[0]))
            start += count
        starts = torch.tensor([0, *new_tokens.values()]).cumsum(0)
        slots_T = torch.cat([*slots, torch.full((padding,), -1)])
        most = max(new_tokens.values())
        described = engines.batch(starts, torch.tensor(lengths), slots_T, self.tables[list(new_tokens)], most)
        metadata = HostBuilder(None, [], None, torch.device("cpu")).build(0, described)
        assert isinstance(metadata, Step)
        output = torch.full_like(query, torch.nan)
        self.impl.forward(None, query, key, value, self.cache, metadata, output)
        return query, output

    def expected(self, request: int, query: Tensor) -> Tensor:
        """float64 attention of the newest queries over the request's tokens, each encoded and decoded once."""
        key, value = (
            part.reconstruct(part.encode(x)).double().repeat_interleave(HEADS // KV_HEADS, 1)
            for part, x in zip((self.codec.k, self.codec.v), self.history[request], strict=True)
        )
        scores = torch.einsum("qhd,thd->hqt", query.double(), key) * SCALE
        visible = torch.ones(len(query), len(key), dtype=torch.bool).tril(len(key) - len(query))
        return torch.einsum("hqt,thd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), value)


def check(engine: Engine, steps: list[dict[int, int]], tolerance: float, padding: int = 0) -> None:
    for new_tokens in steps:
        query, output = engine.step(new_tokens, padding)
        assert output.dtype == engine.dtype
        start = 0
        for request, count in new_tokens.items():
            rows = slice(start, start + count)
            torch.testing.assert_close(
                output[rows].double(), engine.expected(request, query[rows]), atol=tolerance, rtol=tolerance
            )
            start += count


# Prompts cut inside blocks, then decoding, a third request joining, and a step with several drafted tokens.
STEPS = [{0: 7}, {0: 30, 1: 5}, {0: 1, 1: 60}, {0: 1, 1: 1, 2: 33}, {2: 4, 0: 1}, {1: 1, 2: 1, 0: 1}]


def test_mixed_batches(codec: HeadsCodec) -> None:
    engine = Engine(codec)
    check(engine, STEPS, 2e-5)
    assert bool((engine.other == 0xA5).all()), "another layer's bytes were touched"


def test_padding_is_neither_stored_nor_attended(codec: HeadsCodec) -> None:
    check(Engine(codec), STEPS, 2e-5, padding=5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_models(codec: HeadsCodec, dtype: torch.dtype, tolerance: float) -> None:
    check(Engine(codec, dtype), STEPS, tolerance)


@pytest.mark.parametrize("path", ["torch"], indirect=True)
def test_torch_attends_a_long_prompt_in_chunks_of_queries(codec: HeadsCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    attend = attention.attend

    def watched(query: Tensor, k_latent: Tensor, *rest: Any) -> Tensor:
        nonlocal largest
        largest = max(largest, query.shape[0] * HEADS * k_latent.shape[0] * 4)
        return attend(query, k_latent, *rest)

    monkeypatch.setattr(call, "SCORE_BYTES", 8192)
    monkeypatch.setattr(attention, "attend", watched)
    check(Engine(codec), [{0: 100}, {0: 50, 1: 3}], 2e-5)
    assert 4096 < largest <= 8192


def test_rejected_drafts_are_overwritten(codec: HeadsCodec) -> None:
    engine = Engine(codec)
    engine.step({0: 20})
    engine.step({0: 4})
    engine.history[0] = tuple(x[:21] for x in engine.history[0])  # one of four was accepted
    check(engine, [{0: 4}, {0: 1}], 2e-5)


def test_blocks_split_or_scaled_by_the_engine(codec: HeadsCodec) -> None:
    # The cache that arrives decides, not the block size the spec was asked for.
    engine = Engine(codec)
    engine.step({0: 3})
    content = engine.cache.shape[-1]
    for block_size in (64, 32):
        read = engine.impl.latents(torch.zeros(2, KV_HEADS, block_size, content, dtype=torch.uint8), torch.tensor([1]))
        assert [len(side) for side in read] == [block_size] * 2


def test_warm_up_without_metadata_gives_zeros(codec: HeadsCodec) -> None:
    output = torch.full((5, HEADS, HEAD_DIM), torch.nan)
    Engine(codec).impl.forward(None, output, output, output, torch.empty(0), None, output)
    assert bool((output == 0).all())


def test_backend_reads_only_blocks_of_whole_records() -> None:
    sizes = HeadsBackend.get_supported_kernel_block_sizes()
    assert [size.base for size in sizes] == [16]
    assert all(layout.is_block_contiguous for layout in HeadsBackend.supported_kv_cache_layouts())
