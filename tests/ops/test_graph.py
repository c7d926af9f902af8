"""Operations as torch ops: schema, fake implementations, agreement with the methods they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.cases import blocks as blocks_cases
from benchmarks.cases.blocks_sides import cuda_sides
from benchmarks.cases.heads import Cache, bands, random_cache, random_codec
from kvcompress.ops import graph
from kvcompress.ops.blocks import graph as blocks_graph
from kvcompress.ops.heads import graph as heads_graph
from kvcompress.ops.heads.attention import bind
from tests.ops import emulated

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
OPS = torch.ops.kvcompress


@pytest.fixture(params=["compiled", "without_library", "gpu"], autouse=True)
def who(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose operations they are: the CPU's kernels', torch's, or a GPU's by emulation."""
    if request.param == "gpu":
        emulated.count_as_gpu(monkeypatch)
    else:
        request.getfixturevalue(request.param)


def a_cache() -> Cache:
    codec = random_codec(2, 32, bands((8, 16), (4, 16), outliers=1), bands((16, 24)))
    cache, op = random_cache(codec, [100, 70], 64), bind(codec, "cpu")
    cache = emulated.to_fragment(cache, op) if op.on_kernels else replace(cache, op=op)
    return replace(cache, pages_NHX=cache.pages_NHX.contiguous())


def tokens(count: int) -> tuple[Tensor, Tensor]:
    keys_THD, values_THD = torch.randn(2, count, 2, 32, generator=torch.Generator().manual_seed(3))
    return keys_THD, values_THD


def random_query(count: int, head_dim: int) -> Tensor:
    return torch.randn(count, 4, head_dim, generator=torch.Generator().manual_seed(2))


def a_batch() -> blocks_cases.Batch:
    codec = blocks_cases.random_codec(2, 64, cuda_sides(64, 4, v_rank=48))
    batch = blocks_cases.random_batch(codec, [150, 70], [1, 3])
    return replace(batch, pages_NHMB=batch.pages_NHMB.contiguous(), rings_NHXPD=batch.rings_NHXPD.contiguous())


def numbers(*rows: list[int]) -> list[Tensor]:
    return [torch.tensor(row, dtype=torch.int32) for row in rows]


def test_codecs_survive_flattening() -> None:
    for codec in (a_cache().codec, a_batch().op.plan.codec):
        again = graph.unflatten(*graph.flatten(codec))
        assert again.spec == codec.spec
        assert again.tensors().keys() == codec.tensors().keys()
        assert all(torch.equal(tensor, codec.tensors()[name]) for name, tensor in again.tensors().items())


def test_heads_attend() -> None:
    cache, query_THD = a_cache(), random_query(3, 32)
    described = graph.flatten(cache.codec)
    batch = (cache.block_table_RN, *numbers([0, 1, 3], cache.seq_lens))
    arguments = (query_THD, cache.pages_NHX, *batch, 32**-0.5, *described)
    torch.library.opcheck(heads_graph.heads_attend, arguments, test_utils=CHECKS)
    found = OPS.heads_attend(*arguments)
    for one, other in zip(found, cache.attend(query_THD, [1, 2]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["append", "compress"])
def test_heads_that_store(name: str) -> None:
    cache = a_cache()
    where_N = torch.tensor([3, -1, 20, 21, 40] if name == "append" else [1])
    rows = (*tokens(5 if name == "append" else 64), where_N)
    arguments = (cache.pages_NHX, *rows, *graph.flatten(cache.codec))
    torch.library.opcheck(getattr(heads_graph, f"heads_{name}"), arguments, test_utils=CHECKS)
    expected_NHX = cache.pages_NHX.clone()
    getattr(cache.op, name)(expected_NHX, *rows)
    getattr(OPS, f"heads_{name}")(*arguments)
    assert torch.equal(cache.pages_NHX, expected_NHX)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_read(dtype: torch.dtype) -> None:
    cache = a_cache()
    arguments = (cache.pages_NHX, cache.block_table_RN[0], 70)
    described = (*graph.flatten(cache.codec), dtype)
    torch.library.opcheck(heads_graph.heads_read, (*arguments, *described), test_utils=CHECKS)
    found = OPS.heads_read(*arguments, *described)
    for one, other in zip(found, cache.op.read(*arguments, dtype), strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other)


def test_blocks_attend() -> None:
    batch, query_THD = a_batch(), random_query(4, 64)
    caches = (batch.newest(0), batch.newest(1), batch.pages_NHMB, batch.rings_NHXPD, *numbers(batch.ring_R))
    requests = (batch.block_table_RN, *numbers(batch.query_starts, batch.seq_lens), 64**-0.5)
    arguments = (query_THD, *caches, *requests, *graph.flatten(batch.op.plan.codec))
    torch.library.opcheck(blocks_graph.blocks_attend, arguments, test_utils=CHECKS)
    for one, other in zip(OPS.blocks_attend(*arguments), batch.attend(query_THD), strict=True):
        assert torch.equal(one, other)
