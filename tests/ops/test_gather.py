"""Pages back to plain keys and values, and many tokens stored at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvcompress.codec.spec import SideSpec
from kvcompress.ops.compress import compress_pages, compress_pages_op
from kvcompress.ops.gather import gather_decode, gather_decode_op
from tests.ops.cases import POISON, Cache, bands, random_cache, random_codec, relative_error

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")

SIDES = [
    (32, bands((32, 32)), bands((16, 24))),
    (64, bands((8, 24), (4, 16), (2, 8)), bands((8, 8), (4, 8), (2, 40), outliers=2)),
    (128, bands((4, 128), outliers=1), bands((2, 128))),
]


def expected(cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """By the codec, in float64."""
    from kvcompress.codec import pages

    sides = []
    for index, side in enumerate((cache.codec.k, cache.codec.v)):
        requests = []
        for request, length in enumerate(cache.seq_lens):
            blocks_N = cache.block_table_RN[request, : -(-length // cache.layout.block_size)].long()
            latent_THR = pages.read(cache.pages_NHX, cache.layout, cache.codec, blocks_N, length)[index].double()
            requests.append(torch.einsum("thr,hrd->thd", latent_THR, side.decode_HRD.double()) + side.mean_HD)
        sides.append(torch.cat(requests))
    return sides[0], sides[1]


@pytest.mark.parametrize(("head_dim", "k", "v"), SIDES)
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
def test_gathered_tokens_are_the_decoded_ones(
    level: str, head_dim: int, k: SideSpec, v: SideSpec, dtype: torch.dtype, bar: float
) -> None:
    cache = random_cache(random_codec(2, head_dim, k, v), [1, 16, 37, 64, 150], 48)
    found = gather_decode(cache.pages_NHX, cache.layout, cache.plan, cache.block_table_RN, cache.seq_lens, dtype)
    for found_THD, expected_THD in zip(found, expected(cache), strict=True):
        assert found_THD.dtype == dtype
        assert relative_error(found_THD, expected_THD) < bar


@pytest.mark.usefixtures("without_library")
def test_gather_without_the_library() -> None:
    cache = random_cache(random_codec(2, *SIDES[1]), [40, 9])
    lengths = torch.tensor(cache.seq_lens)
    found = gather_decode(cache.pages_NHX, cache.layout, cache.plan, cache.block_table_RN, lengths, torch.float32)
    for found_THD, expected_THD in zip(found, expected(cache), strict=True):
        assert relative_error(found_THD, expected_THD) < 1e-6


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("lengths", "message"), [([40, 49], "outside the cache"), ([81, 1], "block table holds")])
def test_gather_beyond_what_is_stored_is_refused(lengths: list[int], message: str) -> None:
    cache = random_cache(random_codec(2, *SIDES[0]), [40, 9])
    with pytest.raises(ValueError, match=message):
        gather_decode(cache.pages_NHX, cache.layout, cache.plan, cache.block_table_RN, lengths, torch.float32)


def a_prompt(cache: Cache, new: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The newest tokens of each request as `random_cache` made them."""
    generator = torch.Generator().manual_seed(0)
    heads, head_dim = cache.codec.k.mean_HD.shape
    sides = []
    for _ in range(2):
        tokens = [1.5 * torch.randn(length, heads, head_dim, generator=generator) for length in cache.seq_lens]
        sides.append(torch.cat([x[len(x) - count :] for x, count in zip(tokens, new, strict=True)]))
    return sides[0], sides[1], torch.tensor([0, *new]).cumsum(0), torch.tensor(cache.seq_lens)


@pytest.mark.parametrize("new", [[40, 17, 5], [8, 1, 0]])
def test_compressed_pages_are_those_of_append(new: list[int]) -> None:
    cache = random_cache(random_codec(2, *SIDES[1]), [40, 17, 5])
    expected_NHX = cache.pages_NHX.clone()
    # What the newest tokens took is poisoned; a later token's bytes never share an earlier one's.
    for request, (length, count) in enumerate(zip(cache.seq_lens, new, strict=True)):
        for position in range(length - count, length):
            block = int(cache.block_table_RN[request, position // 16])
            for place, side in ((cache.layout.k, cache.codec.k), (cache.layout.v, cache.codec.v)):
                start = place.code_offset + position % 16 * side.spec.code_bytes
                cache.pages_NHX[block, :, start : start + side.spec.code_bytes] = POISON
    keys_THD, values_THD, starts_R, lengths_R = a_prompt(cache, new)
    compress_pages(
        cache.pages_NHX, cache.layout, cache.plan, keys_THD, values_THD, cache.block_table_RN, starts_R, lengths_R
    )
    # The kernel may round a tie the other way than the torch code that filled the cache: compare what is read.
    found = gather_decode(cache.pages_NHX, cache.layout, cache.plan, cache.block_table_RN, cache.seq_lens, torch.float)
    cache.pages_NHX[:] = expected_NHX
    for found_THD, expected_THD in zip(found, expected(cache), strict=True):
        assert relative_error(found_THD, expected_THD) < 1e-4


def test_compress_pages_refuses_what_has_no_place() -> None:
    cache = random_cache(random_codec(2, *SIDES[0]), [40, 9])
    keys_THD, values_THD, starts_R, lengths_R = a_prompt(cache, [4, 4])
    inputs = (cache.pages_NHX, cache.layout, cache.plan, keys_THD, values_THD)
    with pytest.raises(ValueError, match="new tokens in requests of"):
        compress_pages(*inputs, cache.block_table_RN, starts_R, torch.tensor([40, 3]))
    with pytest.raises(ValueError, match="outside the cache"):
        compress_pages(*inputs, torch.full_like(cache.block_table_RN, -1), starts_R, lengths_R)


def op_arguments() -> tuple[Cache, tuple[Any, ...], tuple[Any, ...]]:
    cache = random_cache(random_codec(2, *SIDES[1]), [40, 17])
    tensors, numbers = cache.plan.flatten()
    pages_NHX, lengths_R = cache.pages_NHX.contiguous(), torch.tensor(cache.seq_lens)
    gather = (pages_NHX, cache.block_table_RN, lengths_R, 57, tensors, numbers, 16, torch.bfloat16)
    keys_THD, values_THD, starts_R, lengths_R = a_prompt(cache, [5, 17])
    compress = (pages_NHX, keys_THD, values_THD, cache.block_table_RN, starts_R, lengths_R, tensors, numbers, 16)
    return cache, gather, compress


def test_opcheck() -> None:
    _, gather, compress = op_arguments()
    torch.library.opcheck(gather_decode_op, gather, test_utils=CHECKS)
    torch.library.opcheck(compress_pages_op, compress, test_utils=CHECKS)


def test_ops_are_the_functions() -> None:
    cache, gather, compress = op_arguments()
    found = torch.ops.kvcompress.gather_decode(*gather)
    expected_sides = gather_decode(
        cache.pages_NHX, cache.layout, cache.plan, cache.block_table_RN, cache.seq_lens, torch.bfloat16
    )
    assert all(map(torch.equal, found, expected_sides))
    pages_NHX = compress[0].clone()
    compress_pages(pages_NHX, cache.layout, cache.plan, *compress[1:6])
    torch.ops.kvcompress.compress_pages(*compress)
    assert torch.equal(compress[0], pages_NHX)
