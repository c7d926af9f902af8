"""The torch ops over the kernels: schema, fake implementations, agreement with the functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvcompress.codec.bands import SideSpec
from kvcompress.ops.heads.append import append, append_op
from kvcompress.ops.heads.attention import decode_attention, decode_attention_op
from kvcompress.ops.heads.plan import HeadsPlan
from tests.ops.heads.cases import Cache, bands, random_cache, random_codec

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


K_SIDE = bands((8, 16), (4, 16), outliers=1)


def a_cache(k: SideSpec = K_SIDE) -> Cache:
    return random_cache(random_codec(2, 32, k, bands((16, 24))), [40, 17])


def attention_arguments(cache: Cache) -> tuple[Any, ...]:
    tensors, numbers = cache.plan.flatten()
    query_THD = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(2))
    starts_R, lengths_R = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor(cache.seq_lens, dtype=torch.int32)
    pages_NHX = cache.pages_NHX.contiguous()
    return query_THD, pages_NHX, cache.block_table_RN, starts_R, lengths_R, tensors, numbers, 16, 0.2


def append_arguments(cache: Cache) -> tuple[Any, ...]:
    tensors, numbers = cache.plan.flatten()
    keys_THD, values_THD = torch.randn(2, 5, 2, 32, generator=torch.Generator().manual_seed(3))
    return cache.pages_NHX.contiguous(), keys_THD, values_THD, torch.tensor([3, -1, 20, 21, 40]), tensors, numbers, 16


def test_plans_survive_flattening() -> None:
    plan = a_cache(bands((8, 8), (4, 8), (2, 8), outliers=2)).plan
    again = HeadsPlan.unflatten(*plan.flatten())
    assert again.spec == plan.spec
    assert torch.equal(again.k_decode_HDR, plan.k_decode_HDR)
    assert torch.equal(again.v.weight_HR, plan.v.weight_HR)


def test_opcheck_decode_attention() -> None:
    torch.library.opcheck(decode_attention_op, attention_arguments(a_cache()), test_utils=CHECKS)


def test_opcheck_append() -> None:
    torch.library.opcheck(append_op, append_arguments(a_cache()), test_utils=CHECKS)


def test_ops_are_registered() -> None:
    assert torch.ops.kvcompress.decode_attention.default is not None
    assert torch.ops.kvcompress.append.default is not None


@pytest.mark.parametrize("library", ["compiled", "without_library"])
def test_decode_attention_op_is_the_function(request: pytest.FixtureRequest, library: str) -> None:
    request.getfixturevalue(library)
    cache = a_cache()
    arguments = attention_arguments(cache)
    query_THD, pages_NHX, block_table_RN, starts_R, lengths_R = arguments[:5]
    output_THD, lse_TH = torch.empty_like(query_THD), torch.empty(3, 4)
    decode_attention(
        output_THD,
        query_THD,
        pages_NHX,
        cache.layout,
        cache.plan,
        block_table_RN,
        starts_R,
        lengths_R,
        0.2,
        lse_TH,
    )
    found_THD, found_TH = torch.ops.kvcompress.decode_attention(*arguments)
    assert torch.equal(found_THD, output_THD)
    assert torch.equal(found_TH, lse_TH)


def test_append_op_is_the_function() -> None:
    cache = a_cache()
    arguments = append_arguments(cache)
    expected_NHX = arguments[0].clone()
    append(expected_NHX, cache.layout, cache.plan, *arguments[1:4])
    torch.ops.kvcompress.append(*arguments)
    assert torch.equal(arguments[0], expected_NHX)
