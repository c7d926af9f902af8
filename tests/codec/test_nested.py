from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from kvcompress.codec.bands import Band, SideSpec
from kvcompress.codec.heads.codec import HeadsCodec, SideCodec
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.codec.nested import cut_codecs, cut_spec
from kvcompress.codec.spec import CodecSpec
from tests import tiny


@pytest.mark.parametrize(
    ("bands", "share", "expected"),
    [
        ([(16, 64)], 0.5, [(16, 32)]),
        ([(16, 64)], 0.01, [(16, 8)]),
        ([(16, 64)], 0.7, [(16, 48)]),
        ([(8, 8), (4, 16), (2, 8)], 0.5, [(8, 8), (4, 8)]),
        ([(8, 8), (4, 16), (2, 8)], 0.75, [(8, 8), (4, 16)]),
        ([(8, 8), (4, 16), (2, 8)], 0.2, [(8, 8)]),
        ([(8, 8), (4, 16), (2, 8)], 1.0, [(8, 8), (4, 16), (2, 8)]),
    ],
)
def test_first_channels_in_whole_groups(bands: Any, share: float, expected: Any) -> None:
    side = SideSpec(tuple(Band(*band) for band in bands))
    assert side.cut(share, 32).bands == tuple(Band(*band) for band in expected)


def orthogonal_side(spec: SideSpec, seed: int) -> SideCodec:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(2, 32, 32, generator=generator)).Q[..., : spec.rank].contiguous()
    mean, scale = torch.randn(2, 32, generator=generator), torch.rand(2, spec.rank, generator=generator) + 0.5
    return SideCodec(spec, mean, basis, basis.mT.contiguous(), scale)


def test_cut_codecs_keep_the_first_latents_and_error_grows() -> None:
    spec = tiny.mixed_spec()
    codecs: list[Any] = [
        None if layer is None else HeadsCodec(orthogonal_side(layer.k, 1), orthogonal_side(layer.v, 2))
        for layer in spec.layers
    ]
    keys = torch.randn(50, 2, 32, generator=torch.Generator().manual_seed(3))
    previous, last = [0.0] * len(codecs), [None] * len(codecs)
    for share in (0.75, 0.5, 0.25):
        cut = cut_spec(spec, share)
        found = cut_codecs(codecs, cut)
        for index, codec in enumerate(found):
            if codec is None:
                assert spec.layers[index] is None
                continue
            assert codec.spec == cut.layers[index]
            error = float(
                (codec.round_trip([codec], [keys], [keys], torch.arange(len(keys)))[0][0] - keys).square().sum()
            )
            # Two shares may round to the same number of channel groups.
            assert error > previous[index] if codec.k.spec != last[index] else error == previous[index]
            last[index] = codec.k.spec
            previous[index] = error
    assert cut_codecs(codecs, cut_spec(spec, 1.0)) == codecs


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_shares_outside_the_range_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="above 0 and up to 1"):
        cut_spec(tiny.mixed_spec(), share)


def test_other_forms_are_refused_by_name() -> None:
    @dataclass(frozen=True)
    class Other:
        form = "joined"

    layers: Any = (*tiny.mixed_spec().layers[:1], Other())
    with pytest.raises(ValueError, match="layer 1 has a cache of form 'joined'"):
        cut_spec(CodecSpec(layers), 0.5)


def test_layer_specs_shrink_by_the_share() -> None:
    layer = HeadsSpec(2, 32, SideSpec((Band(16, 32),)), SideSpec((Band(8, 16),)))
    cut = layer.cut(0.5, 32)
    assert cut == replace(layer, k=SideSpec((Band(16, 16),)), v=SideSpec((Band(8, 8),)))
    assert cut.bytes_per_token == 2 * (32 + 8 + 2)


def test_a_checkpoint_without_codecs_has_nothing_to_cut() -> None:
    plain = CodecSpec((None, None))
    assert cut_spec(plain, 1.0) == plain
    with pytest.raises(ValueError, match="no layer of the checkpoint has a codec"):
        cut_spec(plain, 0.5)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(32, [(8, 16), (4, 32), (2, 8)]), (4, [(4, 48), (2, 8)]), (2, [(2, 56)])],
)
def test_narrower_codes_join_their_neighbours(bits: int, expected: list[tuple[int, int]]) -> None:
    side = SideSpec((Band(8, 16), Band(4, 32), Band(2, 8)), outliers=1)
    assert side.cut(1.0, bits) == SideSpec(tuple(Band(*band) for band in expected), outliers=1)
    assert side.cut(0.25, bits).rank == 16


def test_bits_must_be_a_code_width() -> None:
    spec = CodecSpec((HeadsSpec(2, 64, SideSpec((Band(16, 64),)), SideSpec((Band(8, 64),))),))
    assert cut_spec(spec, bits=8).layers[0].k.bands == (Band(8, 64),)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="found KV bits 3; expected 32, 16, 8, 4 or 2"):
        cut_spec(spec, bits=3)
