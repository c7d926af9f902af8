"""Whether the kernels compute on this GPU what the torch code computes: `python -m benchmarks.gpu.check [--small]`.

`--small` is what compute-sanitizer can run in seconds, `--form` one form of cache alone. Exit code 1 and the names of
what failed if anything did.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cases import golden
from benchmarks.cases.heads import POISON, Cache, bands, exact, random_cache, random_codec, relative_error, starts
from benchmarks.cases.heads_sides import MIXED_K, MIXED_V, SIDES, bar
from benchmarks.gpu import blocks, latents, shared
from benchmarks.gpu.graphs import capture
from kvcompress.codec.bands import SideSpec
from kvcompress.codec.heads import fragment
from kvcompress.codec.layout import FRAGMENT
from kvcompress.ops.call import Call
from kvcompress.ops.heads import prefill
from kvcompress.ops.heads.attention import bind
from kvcompress.ops.heads.reference import HeadsOp

Check = Callable[[], None]

DEVICE = "cuda"
"""A test runs these checks on the kernels' emulation."""


def checks(small: bool) -> Iterator[tuple[str, Check]]:
    """Every check of every form, by its name; each raises AssertionError."""
    for of_form in FORMS.values():
        yield from of_form(small)


def heads(small: bool) -> Iterator[tuple[str, Check]]:
    """Those of pages of single tokens, a head at a time."""
    for name in golden.SIDES:
        yield f"golden bytes: {name}", lambda name=name: golden_bytes(name)  # type: ignore[misc]
    sides = [SIDES[3], SIDES[10], SIDES[18]] if small else SIDES
    lengths = [1, 64, 200] if small else [1, 63, 64, 65, 1000, 4111]
    for head_dim, k, v in sides:
        title = f"{_title(k)} and {_title(v)}"
        cache_of = lambda head_dim=head_dim, k=k, v=v: on_device(  # noqa: E731
            random_cache(random_codec(2, head_dim, k, v), lengths, 64)
        )
        yield f"attention: {title}", lambda make=cache_of: attention(make())  # type: ignore[misc]
        yield f"gather: {title}", lambda make=cache_of: gather(make())  # type: ignore[misc]
    yield "graph replayed with other lengths: 4 bits", lambda: graph(bands((4, 128)), bands((4, 128)), small)
    yield "graph replayed with other lengths: bands", lambda: graph(MIXED_K, MIXED_V, small)
    yield "the same twice, and with other splits", repeated
    from benchmarks.gpu import steps  # which needs this module

    yield "a layer's steps in a graph, tokens and padding included", lambda: steps.decoding(small)
    for dtype in prefill.FUSED_DTYPES:
        yield f"a prompt in {dtype}", lambda dtype=dtype: steps.prompt(dtype, small)  # type: ignore[misc]


FORMS: dict[str, Callable[[bool], Iterator[tuple[str, Check]]]] = {
    "heads": heads,
    "blocks": blocks.checks,
    "latents": latents.checks,
    "shared": shared.checks,
}
"""Forms of cache, by the module that times them (`heads`: `sweep`)."""


def _title(side: SideSpec) -> str:
    text = "+".join(f"{band.width}x{band.bits}" for band in side.bands)
    return text + (f" ({side.outliers} outliers)" if side.outliers else "")


def on_device(cache: Cache) -> Cache:
    """A cache of the reference's, in fragment order on the GPU."""
    pages_NHX = fragment.to_fragment(cache.pages_NHX, cache.codec.spec, cache.layout.block_size)
    op = bind(cache.codec, DEVICE)
    assert op.on_kernels
    return Cache(op, pages_NHX.to(DEVICE), cache.block_table_RN.to(DEVICE), cache.seq_lens)


def on_host(cache: Cache) -> Cache:
    op = HeadsOp(cache.codec.to("cpu"), FRAGMENT)
    return Cache(op, cache.pages_NHX.cpu(), cache.block_table_RN.cpu(), cache.seq_lens)


def random_query(tokens: int, heads: int, head_dim: int) -> Tensor:
    return torch.randn(tokens, heads, head_dim, generator=torch.Generator().manual_seed(9)).to(DEVICE)


def close(cache: Cache, found: tuple[Tensor, Tensor], query_THD: Tensor, query_lens: list[int]) -> None:
    host = on_host(cache)
    expected_THD, expected_TH = exact(host, query_THD.cpu(), starts(query_lens), query_THD.shape[2] ** -0.5)
    error = relative_error(found[0].cpu(), expected_THD)
    assert error < bar(host.codec.k.spec, host.codec.v.spec), f"relative error {error:.2e}"
    torch.testing.assert_close(found[1].cpu().double(), expected_TH, rtol=1e-4, atol=2e-3)


def attention(cache: Cache) -> None:
    query_lens = [1] * (len(cache.seq_lens) - 1) + [3]
    query_THD = random_query(sum(query_lens), 8, cache.codec.k.mean_HD.shape[1])
    close(cache, cache.attend(query_THD, query_lens), query_THD, query_lens)


def gather(cache: Cache) -> None:
    host, last = on_host(cache), len(cache.seq_lens) - 1
    length = cache.seq_lens[last]
    found, expected = (one.op.read(one.pages_NHX, one.block_table_RN[last], length) for one in (cache, host))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)


def golden_bytes(name: str) -> None:
    stored = golden.make(name)
    op = bind(stored.codec, DEVICE)
    tokens = stored.keys_THD.to(DEVICE), stored.values_THD.to(DEVICE)
    pages_NHX = torch.full((4, *stored.fragment_HX.shape), POISON, dtype=torch.uint8, device=DEVICE)
    op.compress(pages_NHX, *tokens, torch.tensor([1], device=DEVICE))
    order = torch.randperm(golden.BLOCK_SIZE).to(DEVICE)
    op.append(pages_NHX, *(rows[order] for rows in tokens), 2 * golden.BLOCK_SIZE + order)
    for block in (1, 2):
        assert torch.equal(pages_NHX[block].cpu(), stored.fragment_HX), (
            f"{int((pages_NHX[block].cpu() != stored.fragment_HX).sum())} bytes differ"
        )
    assert bool((pages_NHX[::3] == POISON).all())


def graph(k: SideSpec, v: SideSpec, small: bool) -> None:
    """Capture once, replay with other lengths, other blocks and fewer queries."""
    head_dim = max(64, k.rank)
    longest = 300 if small else 3000
    cache = on_device(random_cache(random_codec(2, head_dim, k, v), [longest, longest], 64))
    query_THD = random_query(2, 8, head_dim)
    output_THD, lse_TH = torch.empty_like(query_THD), torch.empty(2, 8, device=DEVICE)
    table_RN = cache.block_table_RN.clone()
    starts_R = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
    lengths_R = torch.tensor(cache.seq_lens, dtype=torch.int32, device=DEVICE)

    def step() -> None:
        batch = (table_RN, starts_R, lengths_R)
        cache.op.attend(Call(output_THD, query_THD, *batch, head_dim**-0.5, lse_TH, 1), cache.pages_NHX)

    replay = capture(step, DEVICE)
    for lengths, order in (([longest, longest], [0, 1]), ([1, 200], [1, 0]), ([64, longest - 1], [0, 1])):
        lengths_R.copy_(torch.tensor(lengths))
        table_RN.copy_(cache.block_table_RN[order])
        output_THD.fill_(torch.nan)
        replay()
        replayed = replace(cache, block_table_RN=table_RN, seq_lens=lengths)
        close(replayed, (output_THD, lse_TH), query_THD, [1, 1])


def repeated() -> None:
    cache = on_device(random_cache(random_codec(2, 128, bands((4, 128)), bands((2, 128))), [3000, 77], 64))
    query_THD = random_query(2, 8, 128)
    first, second = cache.attend(query_THD, [1, 1]), cache.attend(query_THD, [1, 1])
    assert torch.equal(first[0], second[0])
    for splits in (1, 2, 7, 100):
        output_THD, _ = cache.attend(query_THD, [1, 1], splits=splits)
        assert relative_error(output_THD.cpu(), first[0].cpu().double()) < 5e-4, f"{splits} splits"


def failures(small: bool = False, form: str | None = None) -> dict[str, str]:
    """What failed, by name, and how; of one form, or of all."""
    found = {}
    for name, check in checks(small) if form is None else FORMS[form](small):
        try:
            check()
        except AssertionError as error:
            found[name] = str(error).strip().splitlines()[0] if str(error) else "not equal"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--form", choices=FORMS)
    options = parser.parse_args()
    found = failures(options.small, options.form)
    for name, text in found.items():
        print(f"failed: {name}: {text}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
