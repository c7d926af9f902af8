from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompress.codec.layout import PART_ALIGNMENT, PageLayout
from kvcompress.codec.spec import Band, CodecSpec, LayerSpec, SideSpec

widths = st.integers(0, 6).map(lambda groups: groups * 8)
sides = st.one_of(
    st.integers(1, 16).map(lambda groups: SideSpec((Band(16, groups * 8),))),
    st.tuples(widths, widths, widths)
    .filter(any)
    .map(lambda each: SideSpec(tuple(Band(b, w) for b, w in zip((8, 4, 2), each, strict=True) if w))),
)
layers = st.builds(LayerSpec, num_kv_heads=st.integers(1, 8), head_dim=st.just(144), k=sides, v=sides)


@given(st.lists(st.one_of(st.none(), layers), max_size=4))
def test_json_round_trip(found: list[LayerSpec | None]) -> None:
    spec = CodecSpec(tuple(found))
    assert CodecSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@given(layers, st.integers(1, 16).map(lambda n: n * 16))
def test_pages_hold_exactly_the_stated_bytes_without_overlap(layer: LayerSpec, block_size: int) -> None:
    layout = PageLayout.of(layer, block_size)
    assert layout.page_bytes == block_size * layer.bytes_per_token
    parts = [
        (layout.k_gain_offset, 2 * block_size if layer.k.has_gain else 0),
        (layout.v_gain_offset, 2 * block_size if layer.v.has_gain else 0),
        (layout.k_code_offset, layout.k_code_bytes * block_size),
        (layout.v_code_offset, layout.v_code_bytes * block_size),
    ]
    taken = sorted((start, size) for start, size in parts if size)
    assert all(start % PART_ALIGNMENT == 0 for start, _ in taken)
    position = 0
    for start, size in taken:
        assert start == position
        position += size
    assert position == layout.record_bytes


def test_known_sizes() -> None:
    side = SideSpec((Band(4, 64),))
    layer = LayerSpec(2, 64, side, SideSpec((Band(16, 64),)))
    assert side.bytes_per_token == 34
    assert layer.bytes_per_token == 2 * (34 + 128)


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


def test_rank_above_head_dim() -> None:
    side = SideSpec((Band(4, 64),))
    with pytest.raises(ValueError, match="more than head_dim 32"):
        LayerSpec(1, 32, side, side)


def test_block_size_must_be_a_multiple_of_16() -> None:
    side = SideSpec((Band(4, 8),))
    with pytest.raises(ValueError, match="block size is 24"):
        PageLayout.of(LayerSpec(1, 8, side, side), 24)


@pytest.mark.parametrize("data", [{}, {"layers": [{"num_kv_heads": 1}]}, {"layers": 3}])
def test_unreadable_description(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="codec description"):
        CodecSpec.from_json(data)
