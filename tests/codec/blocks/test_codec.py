"""The block codec: its parts against what they are meant to do, and attention against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvcompress.codec.blocks import encoding as gear_blocks
from kvcompress.codec.blocks.attention import attend
from kvcompress.codec.blocks.codec import BlocksCodec, BlockSideCodec
from kvcompress.codec.blocks.spec import Axis, BlockSide, BlocksSpec
from kvcompress.codec.file import from_tensors, to_tensors
from kvcompress.codec.spec import CodecSpec
from tests.codec.blocks.cases import BLOCK, GROUP, HEAD_DIM, HEADS, SCALE, by_the_rule, codec, side, side_codec


def blocks(seed: int = 0, count: int = 5, rank: int = 24) -> Tensor:
    return torch.randn(count, HEADS, BLOCK, rank, generator=torch.Generator().manual_seed(seed))


def scales(rank: int = 24) -> Tensor:
    return torch.linspace(3, 0.3, rank).repeat(HEADS, 1)


def error(unit: Tensor, spec: BlockSide) -> Tensor:
    """Squared error of each block and head, in the unit that counts."""
    decoded = gear_blocks.decode(gear_blocks.encode(unit, scales(spec.rank), spec), spec)
    return ((decoded - unit) * scales(spec.rank)[:, None]).square().sum((-1, -2))


@pytest.mark.parametrize("along", ["tokens", "channels"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_part_lowers_the_error_of_every_block(along: Axis, bits: int) -> None:
    unit = blocks(count=40)
    quantized = error(unit, side(along, bits, low_rank=0, outliers=0))
    sparse, low_rank = error(unit, side(along, bits, low_rank=0)), error(unit, side(along, bits, outliers=0))
    both = error(unit, side(along, bits))
    assert bool((low_rank < quantized).all())
    assert bool((both < quantized).all())
    assert bool((both < sparse).all())
    assert float(sparse.sum()) < 0.95 * float(quantized.sum())


@pytest.mark.parametrize("along", ["tokens", "channels"])
def test_residual_is_close_to_the_best_of_its_rank(along: Axis) -> None:
    unit = blocks(count=10)
    plain = side(along, low_rank=0, outliers=0)
    rest = (unit - gear_blocks.decode(gear_blocks.encode(unit, scales(), plain), plain)) * scales()[:, None]
    best = torch.linalg.svdvals(rest)[..., 2:].square().sum(-1)
    found = error(unit, replace(plain, low_rank=2, iterations=20))
    assert bool((found >= best * 0.999).all()), "better than the optimum cannot be"
    assert bool((found <= best * 1.05).all())


def test_uniform_quantizer_meets_the_ends_of_its_groups() -> None:
    unit = blocks()
    for along in ("tokens", "channels"):
        spec = side(along, 4, low_rank=0, outliers=0)
        decoded = gear_blocks.decode(gear_blocks.encode(unit, scales(), spec), spec)
        rows, found = (x.mT if along == "tokens" else x for x in (unit, decoded))
        for group, stored in zip(rows.split(16, -1), found.split(16, -1), strict=True):
            step = (group.amax(-1, keepdim=True) - group.amin(-1, keepdim=True)) / 15
            assert bool(((group - stored).abs() <= step * 0.51 + 2e-3).all())


def test_outliers_come_back_exactly_and_do_not_stretch_their_group() -> None:
    unit = blocks()
    plain = error(unit, side("tokens", 4))
    unit[:, :, 3, [2, 17]] *= 1000.0
    spec = side("tokens", 4)
    decoded = gear_blocks.decode(gear_blocks.encode(unit, scales(), spec), spec)
    torch.testing.assert_close(decoded[:, :, 3, [2, 17]], unit[:, :, 3, [2, 17]], rtol=1e-3, atol=1e-3)
    decoded[:, :, 3, [2, 17]] = unit[:, :, 3, [2, 17]]
    rest = ((decoded - unit) * scales()[:, None]).square().sum()
    assert float(rest) < 1.2 * float(plain.sum())


def test_nothing_lost_when_every_entry_is_an_outlier() -> None:
    unit = blocks()
    for along in ("tokens", "channels"):
        spec = side(along, 8, outliers=BLOCK * 24)
        decoded = gear_blocks.decode(gear_blocks.encode(unit, scales(), spec), spec)
        torch.testing.assert_close(decoded, unit, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 3.0, 1e9, float("nan")])
def test_constant_and_broken_blocks_stay_finite(value: float) -> None:
    unit = torch.full((2, HEADS, BLOCK, 24), value)
    for along in ("tokens", "channels"):
        decoded = gear_blocks.decode(gear_blocks.encode(unit, scales(), side(along)), side(along))
        assert bool(torch.isfinite(decoded).all())
        if value in (0.0, 3.0):
            torch.testing.assert_close(decoded, unit, rtol=1e-3, atol=0)


@pytest.mark.parametrize("along", ["tokens", "channels"])
def test_a_block_gives_the_same_bytes_alone_and_among_others(along: Axis) -> None:
    spec, unit = side(along), blocks(count=6)
    together = gear_blocks.encode(unit, scales(), spec)
    assert torch.equal(together, gear_blocks.encode(unit, scales(), spec))
    for index in range(6):
        assert torch.equal(together[index : index + 1], gear_blocks.encode(unit[index : index + 1], scales(), spec))
    changed = unit.clone()
    changed[0] = 7 * torch.randn(unit[0].shape, generator=torch.Generator().manual_seed(9))
    assert torch.equal(together[1:], gear_blocks.encode(changed, scales(), spec)[1:])


@pytest.mark.parametrize("low_rank", [0, 3])
@pytest.mark.parametrize("outliers", [0, 16])
@pytest.mark.parametrize("rank", [8, 24])
def test_a_record_has_the_stated_bytes(rank: int, low_rank: int, outliers: int) -> None:
    k, v = (side(along, 2, low_rank, outliers, rank) for along in ("tokens", "channels"))
    found = BlocksCodec(side_codec(k, 1), side_codec(v, 2))
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(3 * BLOCK, HEADS, HEAD_DIM, generator=generator) for _ in range(2))
    records = found.seal(keys, values)
    spec = found.spec
    assert records.dtype == torch.uint8
    assert records.shape == (3, HEADS, spec.record_bytes)
    assert records.nbytes == 3 * BLOCK * spec.bytes_per_token
    groups = rank * 2 + BLOCK * -(-rank // 16)  # keys have two groups of 16 tokens per channel
    parts = BLOCK * 2 * rank * 2 // 8 + 4 * groups + 2 * 2 * low_rank * (BLOCK + rank) + 2 * 4 * outliers
    assert spec.record_bytes == -(-parts // BLOCK) * BLOCK
    restored = BlocksSpec.from_json(spec.to_json())
    assert restored == spec


def test_codec_file_round_trip() -> None:
    found = codec()
    spec = CodecSpec((found.spec, None))
    assert CodecSpec.from_json(spec.to_json()) == spec
    [restored, _] = from_tensors(spec, to_tensors([found, None]))
    keys = torch.randn(BLOCK, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(4))
    assert isinstance(restored, BlocksCodec)
    assert torch.equal(restored.seal(keys, keys), found.seal(keys, keys))
    assert torch.equal(found.heads(1, 2).seal(keys[:, 1:], keys[:, 1:]), found.seal(keys, keys)[:, 1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "3 bits"),
        ({"rank": 12}, "12 channels"),
        ({"outliers": 12}, "12 outliers"),
        ({"low_rank": 40}, "rank 40"),
        ({"block": 24}, "24 tokens"),
        ({"group": 0}, "groups of 0"),
    ],
)
def test_impossible_specs_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(side("tokens"), **change)  # type: ignore[arg-type]


def history(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    keys, values = (torch.randn(tokens, HEADS, HEAD_DIM, generator=generator) for _ in range(2))
    return torch.randn(tokens, HEADS, GROUP, HEAD_DIM, generator=generator), keys, values


@pytest.mark.parametrize("rank", [24, 32])
@pytest.mark.parametrize("cuts", [[100], [1] * 34, [31, 1, 1, 40], [32, 32, 6], [10, 60], [63, 1, 1]])
def test_attention_follows_the_rule_however_the_tokens_are_cut(cuts: list[int], rank: int) -> None:
    found = codec(rank=rank)
    query, keys, values = history(sum(cuts))
    stored = found.round_trip([found], [keys], [values], torch.arange(len(keys)))[0]
    before = 0
    for count in cuts:
        length = before + count
        whole, start = length // BLOCK * BLOCK, before // BLOCK * BLOCK
        latents = found.open(found.seal(keys[:whole], values[:whole]))
        exact = keys[start:length], values[start:length]
        mixed, _ = attend(query[before:length], latents, exact, start, found, SCALE)
        precise, _ = attend(query[before:length], tuple(x.double() for x in latents), exact, start, found, SCALE)
        for position in range(before, length):
            expected = by_the_rule(query[position], (keys, values), stored, position)
            torch.testing.assert_close(mixed[position - before].double(), expected, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(precise[position - before], expected, atol=3e-6, rtol=3e-6)
        before = length


@pytest.mark.parametrize("side_of_outlier", ["keys", "values", "both"])
def test_planted_massive_activation(side_of_outlier: str) -> None:
    """x100 in two channels of the first token, at four bits: attention's relative error grows by a fifth at most."""
    heads, head_dim, tokens = 2, 64, 256
    generator = torch.Generator().manual_seed(11)
    spread = torch.linspace(2, 0.3, head_dim)
    keys, values, queries = (torch.randn(tokens, heads, head_dim, generator=generator) * spread for _ in range(3))

    def relative_error(keys: Tensor, values: Tensor) -> float:
        sides = []
        for x, along in ((keys, "tokens"), (values, "channels")):
            # The basis is calibrated on other text: here, on the tokens without the first.
            centred = x[1:].transpose(0, 1) - x[1:].mean(0)[:, None]
            variance, axes = torch.linalg.eigh(centred.mT @ centred / (tokens - 1))
            spec = BlockSide(64, head_dim, 4, along, 64, 2, 3, 88)  # type: ignore[arg-type]
            sides.append(BlockSideCodec(spec, x[1:].mean(0), axes.flip(-1), axes.flip(-1).mT, variance.flip(-1).sqrt()))
        codec = BlocksCodec(*sides)
        stored_keys, stored_values = codec.round_trip([codec], [keys], [values], torch.arange(len(keys)))[0]
        scale = head_dim**-0.5
        outputs = []
        for k, v in ((keys, values), (stored_keys, stored_values)):
            weights = (torch.einsum("qhd,thd->hqt", queries.double(), k.double()) * scale).softmax(-1)
            outputs.append(torch.einsum("hqt,thd->hqd", weights, v.double()))
        return float((outputs[1] - outputs[0]).norm() / outputs[0].norm())

    clean = relative_error(keys, values)
    planted_keys, planted_values = keys.clone(), values.clone()
    for name, planted in (("keys", planted_keys), ("values", planted_values)):
        if side_of_outlier in (name, "both"):
            planted[0, :, [5, 40]] *= 100.0
    assert relative_error(planted_keys, planted_values) <= 1.2 * clean


@pytest.mark.parametrize("distinct", [1, 3, 40, 100_000])
@pytest.mark.parametrize("count", [0, 1, 8, 168, 512])
def test_the_largest_entries_are_those_of_a_stable_sort(distinct: int, count: int) -> None:
    numbers = torch.randint(distinct, (3, 2, 512), generator=torch.Generator().manual_seed(count)).float()
    expected = numbers.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values
    assert torch.equal(gear_blocks._largest(numbers, count), expected)
