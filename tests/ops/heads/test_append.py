"""Compiled encoding against the torch reference, byte for byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.cases.heads import POISON, bands, random_codec
from kvcompress.codec.bands import SideSpec
from kvcompress.codec.heads import pages
from kvcompress.codec.heads.codec import HeadsCodec, SideCodec
from kvcompress.codec.heads.layout import PageLayout
from kvcompress.ops.heads.attention import bind

SPECS = [
    bands((32, 40)),
    bands((16, 64)),
    bands((16, 40)),
    bands((8, 64)),
    bands((4, 64)),
    bands((2, 64)),
    bands((8, 8), (4, 24), (2, 8)),
    bands((4, 8), (4, 16), (2, 24)),
    bands((4, 64), outliers=1),
    bands((8, 8), (4, 24), (2, 8), outliers=2),
    bands((2, 8), outliers=2),
]

MIXED = bands((8, 16), (4, 16), (2, 32))
MIXED_EXACT = bands((8, 16), (4, 16), (2, 32), outliers=2)


def both(codec: HeadsCodec, keys_THD: Tensor, values_THD: Tensor, slots_T: Tensor) -> tuple[Tensor, Tensor]:
    """Pages written by the kernel and by the reference; every byte that neither writes is poison."""
    layout = PageLayout.of(codec.spec, 16)
    written = []
    for _ in range(2):
        wide_NHX = torch.full((9, codec.spec.num_kv_heads + 1, layout.record_bytes), POISON, dtype=torch.uint8)
        written.append(wide_NHX[:, :-1])
    bind(codec, "cpu").append(written[0], keys_THD, values_THD, slots_T)
    pages.append(written[1], layout, codec, keys_THD, values_THD, slots_T)
    return written[0], written[1]


def plain_codec(spec: SideSpec, heads: int = 2, head_dim: int = 64) -> HeadsCodec:
    """No rotation, no mean, scales powers of two: the projection has no rounding, so bytes must agree exactly."""
    identity_HDR = torch.eye(head_dim)[:, : spec.rank].expand(heads, -1, -1).contiguous()
    scale_HR = torch.tensor([2.0, 1.0, 0.5, 0.25]).repeat_interleave(16)[: spec.rank].expand(heads, -1).contiguous()
    side = SideCodec(spec, torch.zeros(heads, head_dim), identity_HDR, identity_HDR.mT.contiguous(), scale_HR)
    return HeadsCodec(side, side)


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_without_projection_rounding(level: str, spec: SideSpec) -> None:
    generator = torch.Generator().manual_seed(1)
    keys_THD, values_THD = torch.randn(2, 128, 2, 64, generator=generator)
    compiled, reference = both(plain_codec(spec), keys_THD, values_THD, torch.randperm(144, generator=generator)[:128])
    if spec.has_gain:
        # The gain's sums add up in another order; a tie between two candidates may fall the other way. Then what the
        # codes leave of the outliers changes with the gain: most bytes of the smallest record here.
        assert float((compiled != reference).float().mean()) < (2e-3 if spec.outliers else 1e-4)
    else:
        assert torch.equal(compiled, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS)
def test_bytes_with_a_projection(level: str, spec: SideSpec, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    keys_THD, values_THD = torch.randn(2, 144, 2, 64, generator=generator).to(dtype)
    codec = random_codec(2, 64, spec, spec)
    slots_T = torch.randperm(144, generator=generator)
    compiled, reference = both(codec, keys_THD, values_THD, slots_T)
    # Float32 sums in another order move a latent by one part in 10^6 or so across a rounding boundary now and then;
    # of a float in 32 bits they change the last byte.
    different = 0.5 if spec.bands[0].bits == 32 else 5e-3 if spec.bands[0].bits == 16 or spec.outliers else 2e-4
    assert float((compiled != reference).float().mean()) < different
    layout = PageLayout.of(codec.spec, 16)
    decoded = [
        torch.cat(pages.read(written, layout, codec, torch.arange(9), 144), dim=-1)[slots_T]
        for written in (compiled, reference)
    ]
    # Where a code flips, it lands on the neighbour: the two caches are equally good.
    assert float((decoded[0] - decoded[1]).norm() / decoded[1].norm()) < 2e-2


@pytest.mark.parametrize("case", ["zeros", "constant", "outlier", "huge", "tiny", "infinite", "nan"])
@pytest.mark.parametrize("spec", [bands((32, 64)), bands((16, 64)), MIXED, MIXED_EXACT])
def test_adversarial_tokens(level: str, spec: SideSpec, case: str) -> None:
    x_THD = torch.randn(16, 2, 64, generator=torch.Generator().manual_seed(4))
    if case == "zeros":
        x_THD[:] = 0
    elif case == "constant":
        x_THD[:] = 3.25
    elif case == "outlier":
        x_THD[:, :, 7] *= 100
    elif case == "huge":
        x_THD[:] = 6e4 * x_THD.sign()
    elif case == "tiny":
        x_THD *= 1e-7
    elif case == "infinite":
        x_THD[3, 1, 20] = torch.inf
    else:
        x_THD[3, 1, 20] = torch.nan
    compiled, reference = both(plain_codec(spec), x_THD, x_THD, torch.arange(16))
    if case == "infinite":
        # Infinity times a zero of the projection is NaN: that token is lost in both, the others are not.
        compiled, reference = (written[0].clone() for written in (compiled, reference))
        layout = PageLayout.of(plain_codec(spec).spec, 16)
        other = [token for token in range(16) if token != 3]
        places = [*zip(layout.k, spec.part_bytes, strict=True), *zip(layout.v, spec.part_bytes, strict=True)]
        for offset, width in ((offset, width) for offset, width in places if width):
            parts = [
                written[:, offset : offset + 16 * width].unflatten(1, (16, width)) for written in (compiled, reference)
            ]
            assert torch.equal(parts[0][:2, other], parts[1][:2, other])
        return
    assert float((compiled != reference).float().mean()) < 1e-4


def test_padding_slots_are_skipped(level: str) -> None:
    codec = plain_codec(bands((4, 64)))
    x_THD = torch.randn(6, 2, 64, generator=torch.Generator().manual_seed(5))
    compiled, reference = both(codec, x_THD, x_THD, torch.tensor([5, -1, 20, -1, -1, 143]))
    assert torch.equal(compiled, reference)


def test_strided_keys_and_int32_slots(level: str) -> None:
    codec = random_codec(2, 64, bands((8, 64)), bands((8, 32)))
    packed = torch.randn(10, 6, 64, generator=torch.Generator().manual_seed(6))
    contiguous, _ = both(codec, packed[:, 2:4].contiguous(), packed[:, 4:].contiguous(), torch.arange(10))
    strided, _ = both(codec, packed[:, 2:4], packed[:, 4:], torch.arange(10, dtype=torch.int32))
    assert torch.equal(contiguous, strided)


def test_no_tokens(level: str) -> None:
    codec = plain_codec(bands((4, 64)))
    compiled, reference = both(codec, torch.zeros(0, 2, 64), torch.zeros(0, 2, 64), torch.zeros(0, dtype=torch.int64))
    assert torch.equal(compiled, reference)


@pytest.mark.usefixtures("compiled")
def test_a_slot_outside_the_cache_is_refused() -> None:
    codec = plain_codec(bands((4, 64)))
    x_THD = torch.zeros(1, 2, 64)
    with pytest.raises(ValueError, match="outside the cache"):
        both(codec, x_THD, x_THD, torch.tensor([144]))
