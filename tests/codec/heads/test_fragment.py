"""Pages in fragment order: exact conversion, the places the docstring promises, golden bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.cases import golden
from benchmarks.cases.heads import bands, random_codec
from kvcompress.codec.bands import Band, SideSpec
from kvcompress.codec.heads import fragment, pages
from kvcompress.codec.heads.layout import PageLayout
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.codec.layout import FRAGMENT
from kvcompress.ops.heads.attention import bind
from tests.golden import pages as committed


@st.composite
def sides(draw: st.DrawFn) -> SideSpec:
    if draw(st.booleans()):
        return SideSpec((Band(16, 8 * draw(st.integers(1, 8))),))
    bits = sorted(draw(st.sets(st.sampled_from([8, 4, 2]), min_size=1)), reverse=True)
    return SideSpec(tuple(Band(b, 8 * draw(st.integers(1, 6))) for b in bits), draw(st.integers(0, 2)))


@settings(max_examples=40, deadline=None)
@given(k=sides(), v=sides(), block_size=st.sampled_from([64, 128, 192]), seed=st.integers(0, 2**31))
def test_conversion_is_a_permutation_of_bits(k: SideSpec, v: SideSpec, block_size: int, seed: int) -> None:
    spec = HeadsSpec(2, 256, k, v)
    record_bytes = PageLayout.of(spec, block_size).record_bytes
    generator = torch.Generator().manual_seed(seed)
    token_major_NHX = torch.randint(0, 256, (2, 2, record_bytes), generator=generator, dtype=torch.uint8)
    fragment_NHX = fragment.to_fragment(token_major_NHX, spec, block_size)
    assert torch.equal(fragment.to_token_major(fragment_NHX, spec, block_size), token_major_NHX)
    assert int(_bits(fragment_NHX)) == int(_bits(token_major_NHX))


def _bits(x: torch.Tensor) -> torch.Tensor:
    return sum((x >> shift & 1).sum() for shift in range(8))  # type: ignore[return-value]


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_every_code_is_where_the_docstring_says(bits: int, keys: bool) -> None:
    """One code at a time, found by the formulas of the docstring, written out anew."""
    side, other = bands((bits, 24)), bands((8, 8))
    spec = HeadsSpec(1, 32, *((side, other) if keys else (other, side)))
    layout = PageLayout.of(spec, 128), PageLayout.of(spec, 128, FRAGMENT)
    start, chunk_start = ((place.k if keys else place.v).code_offset for place in layout)
    for token, channel in [(0, 0), (1, 0), (0, 1), (8, 3), (17, 9), (63, 23), (64, 5), (100, 16), (127, 23)]:
        record = torch.zeros(1, 1, layout[0].record_bytes, dtype=torch.uint8)
        first_bit = bits * channel
        record[0, 0, start + token * side.code_bytes + first_bit // 8] = 1 << first_bit % 8
        found = fragment.to_fragment(record, spec, 128)[0, 0]
        chunk, token_in = divmod(token, 64)
        unit, c = divmod(channel, 8)
        f, i = token_in // 16, token_in // 8 % 2
        lane, e = (4 * (token_in % 8) + c // 2, c % 2) if keys else (4 * c + token_in % 8 // 2, token_in % 2)
        j, pairs = 2 * f + i, 16 // bits
        word, bit = j // pairs, 16 * e + bits * (j % pairs)
        place = 512 * (word // 4) + 16 * lane + 4 * (word % 4) if bits == 16 else 2 * bits * lane + 4 * word
        byte = chunk * (layout[1].record_bytes // 2) + chunk_start + unit * 64 * bits + place + bit // 8
        assert found.nonzero().flatten().tolist() == [byte]
        assert int(found[byte]) == 1 << bit % 8


@pytest.mark.parametrize("name", golden.SIDES)
def test_golden_bytes_of_the_reference(name: str) -> None:
    stored, made = committed.read(name), golden.make(name)
    assert torch.equal(made.token_major_HX, stored.token_major_HX)
    assert torch.equal(made.fragment_HX, stored.fragment_HX)
    back_NHX = fragment.to_token_major(stored.fragment_HX[None], stored.codec.spec, golden.BLOCK_SIZE)
    assert torch.equal(back_NHX[0], stored.token_major_HX)


@pytest.mark.parametrize("name", golden.SIDES)
def test_golden_bytes_of_the_cpu_kernels(name: str) -> None:
    stored = committed.read(name)
    pages_NHX = torch.zeros_like(stored.token_major_HX)[None]
    bind(stored.codec, "cpu").append(pages_NHX, stored.keys_THD, stored.values_THD, torch.arange(golden.BLOCK_SIZE))
    assert torch.equal(pages_NHX[0], stored.token_major_HX)


def test_the_reference_reads_and_writes_fragment_pages() -> None:
    codec = random_codec(2, 64, bands((8, 8), (4, 24), outliers=1), bands((2, 40)))
    plain, fragments = (PageLayout.of(codec.spec, 64, order) for order in ("token_major", FRAGMENT))
    generator = torch.Generator().manual_seed(3)
    keys_THD, values_THD = torch.randn(2, 90, 2, 64, generator=generator)
    slots_T = torch.randperm(256, generator=generator)[:90]
    token_major_NHX, fragment_NHX = (torch.zeros(4, 2, plain.record_bytes, dtype=torch.uint8) for _ in range(2))
    pages.append(token_major_NHX, plain, codec, keys_THD, values_THD, slots_T)
    for chosen in torch.arange(90).split(30):
        pages.append(fragment_NHX, fragments, codec, keys_THD[chosen], values_THD[chosen], slots_T[chosen])
    assert torch.equal(fragment.to_token_major(fragment_NHX, codec.spec, 64), token_major_NHX)
    blocks_N = torch.tensor([2, 0, 3])
    found, expected = (
        pages.read(pages_NHX, layout, codec, blocks_N, 150)
        for pages_NHX, layout in ((fragment_NHX, fragments), (token_major_NHX, plain))
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_layouts_that_do_not_exist() -> None:
    spec = HeadsSpec(1, 32, bands((4, 32)), bands((4, 32)))
    with pytest.raises(ValueError, match="block size is 80; compressed pages need a positive multiple of 64"):
        PageLayout.of(spec, 80, FRAGMENT)
    floats = HeadsSpec(1, 32, bands((32, 32)), bands((4, 32)))
    with pytest.raises(ValueError, match="found channels of 32 bits"):
        PageLayout.of(floats, 64, FRAGMENT)
