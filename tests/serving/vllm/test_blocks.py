"""Blocks and rings on caches as vLLM hands them over, against the rule in float64: no scheduler step may break it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcompress.codec.blocks.codec import BlocksCodec
from kvcompress.codec.spec import CodecSpec
from kvcompress.ops import call, library
from tests import require
from tests.codec.blocks.cases import BLOCK, HEAD_DIM, HEADS, by_the_rule, codec

require.need("vllm")


from kvcompress.serving.vllm import blocks, compat
from tests.serving.vllm import engines

GROUP, DRAFTS, PER_PAGE, NUM_BLOCKS = 3, 3, 2, 24
SCALE = HEAD_DIM**-0.5


NOW: Any = SimpleNamespace(cache_config=SimpleNamespace(block_size=PER_PAGE * BLOCK))
"""As much of vLLM's config as is looked at when it asks for specs."""


def serving(**changes: Any) -> compat.Engine:
    chosen = {"block_size": PER_PAGE * BLOCK, "block_size_chosen": True, "speculative_tokens": DRAFTS}
    return engines.engine(**chosen | changes)


class Engine:
    """Block tables, rings and metadata for a few requests, as vLLM's runner makes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.codec: BlocksCodec = codec()
        engine, layer = serving(), engines.layer(HEADS * GROUP, HEADS, HEAD_DIM)
        blocks.attach(layer, self.codec, engine, [])
        self.layer, self.impl = layer.module, layer.impl
        self.impl.use_codec(self.codec, torch.device("cpu"), 512)
        [self.ring] = engine.config.compilation_config.static_forward_context.values()
        spec, ring_spec = self.layer.get_kv_cache_spec(NOW), self.ring.get_kv_cache_spec(NOW)
        # Pages and ring in one block with another layer's page between, and no block starts as zeros.
        width = spec.page_size_bytes + 64 + ring_spec.page_size_bytes
        self.memory = torch.full((NUM_BLOCKS, width), 0x7B, dtype=torch.uint8)
        self.cache = self.memory[:, : spec.page_size_bytes].view(NUM_BLOCKS, HEADS, PER_PAGE * BLOCK, -1)
        ring = self.memory[:, spec.page_size_bytes + 64 :].view(torch.float32)
        self.ring.bind_kv_cache(ring.view(NUM_BLOCKS, HEADS, 1, -1))
        self.other = self.memory[:, spec.page_size_bytes : spec.page_size_bytes + 64]
        self.generator = torch.Generator().manual_seed(3)
        order = 1 + torch.randperm(NUM_BLOCKS - 1, generator=self.generator)
        self.tables, self.rings = order[:18].reshape(3, 6), order[18:21, None]
        self.history: dict[int, tuple[Tensor, Tensor]] = {}
        monkeypatch.setattr(compat, "layer_metadata", lambda _: SimpleNamespace(block_table=self.rings[self.running]))

    def step(self, new_tokens: dict[int, int]) -> tuple[Tensor, Tensor]:
        """Run one step with so many new tokens of each request; returns queries and outputs."""
        total, self.running = sum(new_tokens.values()), list(new_tokens)
        query, key, value = (
            torch.randn(total + 2, heads, HEAD_DIM, generator=self.generator) for heads in (HEADS * GROUP, HEADS, HEADS)
        )
        lengths, start = [], 0
        for request, count in new_tokens.items():
            old = self.history.get(request, (key[:0], value[:0]))
            grown = tuple(torch.cat([x, new[start : start + count]]) for x, new in zip(old, (key, value), strict=True))
            self.history[request] = grown
            lengths.append(len(grown[0]))
            start += count
        metadata = SimpleNamespace(
            num_actual_tokens=total,
            block_table=self.tables[self.running],
            query_starts=torch.tensor([0, *new_tokens.values()]).cumsum(0),
            seq_lens=torch.tensor(lengths),
        )
        output = torch.full_like(query, torch.nan)
        self.impl.forward(None, query, key, value, self.cache, metadata, output)
        return query[:total], output[:total]

    def check(self, *steps: dict[int, int]) -> None:
        for new_tokens in steps:
            query, output = self.step(new_tokens)
            start = 0
            for request, count in new_tokens.items():
                keys, values = self.history[request]
                stored = self.codec.round_trip([self.codec], [keys], [values], torch.arange(len(keys)))[0]
                for index in range(count):
                    position = len(keys) - count + index
                    rows = query[start + index].unflatten(0, (HEADS, GROUP))
                    expected = by_the_rule(rows, (keys, values), stored, position).flatten(0, 1)
                    torch.testing.assert_close(output[start + index].double(), expected, atol=2e-5, rtol=2e-5)
                start += count
        assert bool((self.other == 0x7B).all()), "another layer's bytes were touched"


@pytest.fixture(params=["kernels", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    if request.param == "torch":
        monkeypatch.setattr(library, "load", lambda: None)
    else:
        require.need("kernels")
    return Engine(monkeypatch)


def test_mixed_batches_cut_anywhere(engine: Engine) -> None:
    engine.check({0: 7}, {0: 30, 1: 31}, {1: 1, 0: 1}, {1: 1, 2: 100, 0: 0}, {0: 26, 1: 1, 2: 1}, {2: 60, 0: 1})


def test_rejected_drafts_that_completed_a_block(engine: Engine) -> None:
    engine.step({0: BLOCK - 2})
    for accepted in (1, 2, 1, 4, 3):
        engine.check({0: 1 + DRAFTS})
        kept = len(engine.history[0][0]) - 1 - DRAFTS + accepted
        engine.history[0] = tuple(x[:kept] for x in engine.history[0])
    engine.check({0: 1}, {0: 40})


def test_prefix_hit_reads_pages_and_not_what_is_left_in_a_ring(engine: Engine) -> None:
    page = PER_PAGE * BLOCK
    engine.check({0: page + 10}, {1: 45})
    # Another request with the same first page, on the ring of a request that has gone.
    engine.tables[2, 0] = engine.tables[0, 0]
    engine.rings[2] = engine.rings[1]
    engine.history[2] = tuple(x[:page] for x in engine.history[0])
    engine.check({2: 5}, {2: 30}, {0: 3, 2: 1})


def test_long_prompt_in_chunks_of_queries(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "SCORE_BYTES", 16384)
    engine.check({0: 150}, {0: 33, 1: 3})


def test_warm_up_without_metadata_gives_zeros(engine: Engine) -> None:
    output = torch.full((5, HEADS * GROUP, HEAD_DIM), torch.nan)
    engine.impl.forward(None, output, output, output, torch.empty(0), None, output)
    assert bool((output == 0).all())


def test_specs_state_the_stored_bytes(engine: Engine) -> None:
    pages, ring = engine.layer.get_kv_cache_spec(NOW), engine.ring.get_kv_cache_spec(NOW)
    assert pages.page_size_bytes == PER_PAGE * BLOCK * engine.codec.spec.bytes_per_token
    assert ring.page_size_bytes == (BLOCK + 1 + DRAFTS) * 2 * HEADS * HEAD_DIM * 4
    assert ring.block_size == pages.block_size, "prefix hits are cut to common multiples of all block sizes"
    assert ring.max_num_blocks_per_req(NOW, 1000) == 16
    assert not ring.prefix_cacheable
    with pytest.raises(ValueError, match=f"use a multiple of that, such as {2 * BLOCK}"):
        blocks.cache_spec(engine.codec.spec, BLOCK + 16)


def test_backend_asks_for_pages_of_whole_blocks() -> None:
    [size] = blocks.backend_of(64).get_supported_kernel_block_sizes()
    assert size.base == 64
    assert blocks.backend_of(64) is blocks.backend_of(64)
    assert blocks.backend_of(64).get_preferred_block_size(16) == 64
    assert blocks.backend_of(32).full_cls_name() != blocks.backend_of(64).full_cls_name()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": BLOCK + 16}, f"--block-size {BLOCK + 16}"),
        ({"hybrid_manager": False}, "hybrid-kv-cache-manager"),
        ({"transfers_cache": True}, "--kv-transfer-config"),
    ],
)
def test_engine_options_it_lacks_are_refused(change: dict[str, Any], message: str) -> None:
    whole = CodecSpec((codec().spec,))
    blocks.check(serving(), whole)
    with pytest.raises(ValueError, match=message):
        blocks.check(serving(**change), whole)


def test_uncompressed_layers_are_refused_where_caches_cannot_be_mixed() -> None:
    mixed = CodecSpec((codec().spec, None))
    with pytest.raises(ValueError, match="leaves some layers uncompressed"):
        blocks.check(serving(), mixed)
    blocks.check(serving(device=torch.device("cuda")), mixed)
