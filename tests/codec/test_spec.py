from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress.codec.bands import Band, SideSpec
from kvcompress.codec.blocks.spec import Axis, BlockSide, BlocksSpec
from kvcompress.codec.heads.layout import PageLayout
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.codec.latent.spec import LatentSpec
from kvcompress.codec.layout import PART_ALIGNMENT
from kvcompress.codec.prompt.spec import PromptSpec
from kvcompress.codec.shared.spec import SharedSpec
from kvcompress.codec.spec import CacheSpec, CodecSpec
from kvcompress.forms import FORMS

widths = st.integers(0, 6).map(lambda groups: groups * 8)
sides = st.one_of(
    st.builds(lambda bits, groups: SideSpec((Band(bits, groups * 8),)), st.sampled_from([32, 16]), st.integers(1, 16)),
    st.builds(
        lambda each, outliers: SideSpec(tuple(Band(b, w) for b, w in zip((8, 4, 2), each, strict=True) if w), outliers),
        st.tuples(widths, widths, widths).filter(any),
        st.integers(0, 2),
    ),
)
layers = st.builds(HeadsSpec, num_kv_heads=st.integers(1, 8), head_dim=st.just(144), k=sides, v=sides)

groups = st.lists(st.integers(0, 40), min_size=1, max_size=4, unique=True).map(lambda found: tuple(sorted(found)))
numbers = st.integers(0, 64)


@st.composite
def grouped(draw: st.DrawFn) -> CacheSpec:
    """A layer of a form that layers have in common."""
    group, share = draw(groups), draw(st.sampled_from(["kv", "v"]))
    place = draw(st.integers(0, len(group) - 1))
    if draw(st.booleans()):
        ends = draw(numbers), draw(numbers), draw(st.sampled_from([2, 4]))
        return SharedSpec(2, 144, group, place, share, draw(sides), draw(sides), *ends)
    ranks = draw(st.integers(1, 288)) if share == "kv" else 0, draw(st.integers(1, 288))
    return PromptSpec(2, 144, group, place, share, *ranks, draw(st.sampled_from([2, 4])), draw(numbers), draw(numbers))


@st.composite
def blocks(draw: st.DrawFn) -> BlocksSpec:
    def side(along: Axis) -> BlockSide:
        low_rank, outliers = draw(st.integers(0, 8)), 8 * draw(st.integers(0, 8))
        return BlockSide(
            32, 8 * draw(st.integers(1, 16)), draw(st.sampled_from([2, 4, 8])), along, 16, low_rank, 2, outliers
        )

    return BlocksSpec(2, 144, side("tokens"), side("channels"))


latents = st.builds(LatentSpec, st.integers(1, 600), st.integers(1, 600), st.sampled_from([2, 4]))


@given(st.lists(st.one_of(st.none(), layers, grouped(), blocks(), latents), max_size=4))
def test_json_round_trip(found: list[CacheSpec | None]) -> None:
    spec = CodecSpec(tuple(found))
    again = CodecSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert [layer and layer.bytes_per_token for layer in again.layers] == [
        layer and layer.bytes_per_token for layer in found
    ]


def test_every_form_is_tried_above() -> None:
    assert {cls.form for cls in (HeadsSpec, SharedSpec, PromptSpec, BlocksSpec, LatentSpec)} == set(FORMS)


@given(layers, st.integers(1, 16).map(lambda n: n * 16))
def test_pages_hold_exactly_the_stated_bytes_without_overlap(layer: HeadsSpec, block_size: int) -> None:
    layout = PageLayout.of(layer, block_size)
    assert layout.page_bytes == block_size * layer.bytes_per_token
    parts = [
        (offset, size * block_size)
        for place, side in ((layout.k, layer.k), (layout.v, layer.v))
        for offset, size in zip(place, side.part_bytes, strict=True)
    ]
    assert all((offset == -1) == (size == 0) for offset, size in parts)
    taken = sorted((start, size) for start, size in parts if size)
    assert all(start % PART_ALIGNMENT == 0 for start, _ in taken)
    position = 0
    for start, size in taken:
        assert start == position
        position += size
    assert position == layout.record_bytes


def test_known_sizes() -> None:
    side = SideSpec((Band(4, 64),))
    layer = HeadsSpec(2, 64, side, SideSpec((Band(16, 64),)))
    assert side.bytes_per_token == 34
    assert layer.bytes_per_token == 2 * (34 + 128)
    assert SideSpec((Band(4, 64),), 2).bytes_per_token == 34 + 2 * 3
    assert SideSpec((Band(32, 64),)).bytes_per_token == 256


@pytest.mark.parametrize(
    ("bands", "words"),
    [
        ([], "at least one band"),
        ([(3, 8)], "3 bits"),
        ([(4, 12)], "12 channels"),
        ([(2, 8), (4, 8)], "most to fewest"),
        ([(16, 8), (4, 8)], "stands alone"),
    ],
)
def test_impossible_bands(bands: list[tuple[int, int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SideSpec(tuple(Band(*band) for band in bands))


@pytest.mark.parametrize(
    ("bands", "outliers", "words"),
    [
        (((4, 8),), 3, "found 3 outliers per token and head; expected 0 to 2"),
        (((4, 8),), -1, "found -1 outliers"),
        (((16, 8),), 1, "16-bit channels are exact"),
        (((32, 8),), 2, "32-bit channels are exact"),
        (((4, 264),), 1, "found 264 channels, expected up to 256"),
    ],
)
def test_impossible_outliers(bands: tuple[tuple[int, int], ...], outliers: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SideSpec(tuple(Band(*band) for band in bands), outliers)


def test_a_codec_written_before_there_were_outliers_reads_as_having_none() -> None:
    side = {"bands": [[4, 8]]}
    read = HeadsSpec.from_json({"num_kv_heads": 1, "head_dim": 8, "k": side, "v": side})
    assert (read.k.outliers, read.to_json()["k"]) == (0, side)


def test_rank_above_head_dim() -> None:
    side = SideSpec((Band(4, 64),))
    with pytest.raises(ValueError, match="more than head_dim 32"):
        HeadsSpec(1, 32, side, side)


def test_block_size_must_be_a_multiple_of_16() -> None:
    side = SideSpec((Band(4, 8),))
    with pytest.raises(ValueError, match="block size is 24"):
        PageLayout.of(HeadsSpec(1, 8, side, side), 24)


@pytest.mark.parametrize("data", [{}, {"layers": [{"num_kv_heads": 1}]}, {"layers": 3}])
def test_unreadable_description(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="codec description"):
        CodecSpec.from_json(data)
