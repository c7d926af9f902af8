"""What a serving engine does with one layer, on the GPU and without the engine: steps that decode, and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from benchmarks.cases.heads import bands, exact, random_cache, random_codec, relative_error, starts
from benchmarks.cases.heads_sides import MIXED_K, MIXED_V
from benchmarks.gpu import check
from benchmarks.gpu.graphs import capture
from kvcompress.ops.call import Call


def decoding(small: bool) -> None:
    """What a serving engine does with a layer: store the step's tokens, then attend, captured with a made-up batch.

    Tokens, slots, blocks and lengths are then written into the tensors that were captured. The last row becomes
    padding: a token without a slot, of a request without queries.
    """
    longest = 300 if small else 3000
    cache = check.on_device(random_cache(random_codec(2, 64, MIXED_K, bands((4, 56), outliers=1)), [longest] * 3, 64))
    op, pages_NHX, stored_NHX = cache.op, cache.pages_NHX, cache.pages_NHX.clone()
    query_THD, key_THD, value_THD = (torch.zeros(4, heads, 64, device=check.DEVICE) for heads in (8, 2, 2))
    output_THD, lse_TH = torch.empty_like(query_THD), torch.empty(4, 8, device=check.DEVICE)
    slots_T = torch.full((4,), -1, dtype=torch.int64, device=check.DEVICE)
    starts_R, lengths_R = (torch.arange(5, device=check.DEVICE).int(), torch.ones(4, device=check.DEVICE).int())
    table_RN = torch.zeros(4, cache.block_table_RN.shape[1], dtype=torch.int32, device=check.DEVICE)

    def step() -> None:
        op.append(pages_NHX, key_THD, value_THD, slots_T)
        op.attend(Call(output_THD, query_THD, table_RN, starts_R, lengths_R, 0.125, lse_TH, 1), pages_NHX)

    replay = capture(step, check.DEVICE)
    assert torch.equal(pages_NHX, stored_NHX), "tokens without a slot were stored"
    starts_R[4] = 3
    table_RN[:3] = cache.block_table_RN
    # The next token begins a block, is a request's first, is in the middle of one.
    lengths = [64, 0, longest - 5]
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        for rows_THD in (query_THD, key_THD, value_THD):
            rows_THD.copy_(torch.randn(rows_THD.shape, generator=generator))
        for request, position in enumerate(lengths):
            slots_T[request] = cache.block_table_RN[request, position // 64] * 64 + position % 64
        lengths = [length + 1 for length in lengths]
        lengths_R.copy_(torch.tensor([*lengths, 0]))
        output_THD.fill_(torch.nan)
        replay()
        check.close(replace(cache, seq_lens=lengths), (output_THD[:3], lse_TH[:3]), query_THD[:3], [1] * 3)
        for request, length in enumerate(lengths):
            found = op.read(pages_NHX, cache.block_table_RN[request], length)
            for side, latent_THR, rows_THD in zip(
                (cache.codec.k, cache.codec.v), found, (key_THD, value_THD), strict=True
            ):
                expected_1HR = side.decode(side.encode(rows_THD[request : request + 1])).double()
                assert relative_error(latent_THR[-1:], expected_1HR) < 0.05, "another token was stored"


def prompt(dtype: torch.dtype, small: bool) -> None:
    """Chunks of two prompts, one of which has a past: keys and values are decoded, and torch attends."""
    cache = check.on_device(random_cache(random_codec(2, 64, MIXED_K, MIXED_V), [400 if small else 9000, 100], 64))
    query_lens, scale = [150, 100], 0.125
    query_THD = check.random_query(sum(query_lens), 8, 64).to(dtype)
    output_THD = torch.full_like(query_THD, torch.nan)
    batch = (cache.block_table_RN, starts(query_lens), cache.seq_lens)
    with no_waits():
        cache.op.attend(Call(output_THD, query_THD, *batch, scale), cache.pages_NHX)
    expected_THD, _ = exact(check.on_host(cache), query_THD.cpu(), starts(query_lens), scale)
    error = relative_error(output_THD.cpu(), expected_THD)
    assert error < (8e-3 if dtype == torch.bfloat16 else 1e-3), f"relative error {error:.2e}"


@contextmanager
def no_waits() -> Iterator[None]:
    """Have CUDA refuse whatever waits for the device."""
    if check.DEVICE == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        raise AssertionError(f"the host waits: {error}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")
