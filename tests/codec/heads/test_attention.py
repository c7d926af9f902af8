"""Pages and attention against exact float64 attention on the decoded tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcompress.codec.bands import Band, SideSpec
from kvcompress.codec.file import from_tensors, to_tensors
from kvcompress.codec.heads import attention, pages
from kvcompress.codec.heads.codec import HeadsCodec, SideCodec
from kvcompress.codec.heads.layout import PageLayout
from kvcompress.codec.spec import CodecSpec

HEADS, GROUP, HEAD_DIM = 2, 3, 32
SIDES = {
    "32": SideSpec((Band(32, 32),)),
    "16": SideSpec((Band(16, 32),)),
    "8": SideSpec((Band(8, 32),)),
    "4": SideSpec((Band(4, 24),)),
    "2": SideSpec((Band(2, 32),)),
    "banded": SideSpec((Band(8, 8), Band(4, 8), Band(2, 8))),
    "4, one exact": SideSpec((Band(4, 32),), 1),
    "banded, two exact": SideSpec((Band(8, 8), Band(4, 8), Band(2, 8)), 2),
}


def side_codec(spec: SideSpec, seed: int) -> SideCodec:
    """A random well-conditioned basis that is not orthogonal, as the attention metric gives."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(HEAD_DIM) + 0.1 * torch.randn(HEADS, HEAD_DIM, HEAD_DIM, generator=generator)
    return SideCodec(
        spec,
        torch.randn(HEADS, HEAD_DIM, generator=generator),
        mixing[..., : spec.rank].contiguous(),
        torch.linalg.inv(mixing)[:, : spec.rank].contiguous(),
        torch.linspace(2, 0.2, spec.rank).repeat(HEADS, 1),
    )


def layer_codec(k: str, v: str) -> HeadsCodec:
    return HeadsCodec(side_codec(SIDES[k], 1), side_codec(SIDES[v], 2))


def exact(query_QHGD: Tensor, keys_THD: Tensor, values_THD: Tensor, scale: float) -> Tensor:
    queries, tokens = len(query_QHGD), len(keys_THD)
    scores = torch.einsum("qhgd,thd->hgqt", query_QHGD.double(), keys_THD.double()) * scale
    visible = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hgqt,thd->qhgd", weights, values_THD.double())


@pytest.mark.parametrize(
    ("k", "v"),
    [
        ("16", "16"),
        ("8", "4"),
        ("4", "2"),
        ("2", "8"),
        ("banded", "banded"),
        ("16", "4"),
        ("32", "32"),
        ("4, one exact", "banded, two exact"),
        ("banded, two exact", "8"),
        ("32", "4, one exact"),
    ],
)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 70])
def test_paged_attention_equals_exact_attention_on_the_stored_tokens(k: str, v: str, tokens: int) -> None:
    codec = layer_codec(k, v)
    layout = PageLayout.of(codec.spec, 16)
    generator = torch.Generator().manual_seed(tokens)
    keys, values = (torch.randn(tokens, HEADS, HEAD_DIM, generator=generator) for _ in range(2))
    blocks = torch.randperm(12, generator=generator)
    slots = blocks[torch.arange(tokens) // 16] * 16 + torch.arange(tokens) % 16
    # Garbage everywhere first: nothing may depend on bytes that were not written.
    memory = torch.full((12, HEADS, layout.record_bytes), 0xFF, dtype=torch.uint8)
    for part in torch.arange(tokens).split(7):
        pages.append(memory, layout, codec, keys[part], values[part], slots[part])
    k_latent, v_latent = pages.read(memory, layout, codec, blocks[: -(-tokens // 16)], tokens)
    queries = min(tokens, 5)
    query = torch.randn(queries, HEADS, GROUP, HEAD_DIM, generator=generator)
    found, _ = attention.attend(query, k_latent, v_latent, codec, HEAD_DIM**-0.5)
    stored = [side.reconstruct(side.encode(x)) for side, x in ((codec.k, keys), (codec.v, values))]
    torch.testing.assert_close(found.double(), exact(query, stored[0], stored[1], HEAD_DIM**-0.5), rtol=1e-4, atol=1e-4)


def test_full_rank_sixteen_bits_equals_plain_attention() -> None:
    codec = layer_codec("16", "16")
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(200, HEADS, HEAD_DIM, generator=generator) for _ in range(2))
    query = torch.randn(9, HEADS, GROUP, HEAD_DIM, generator=generator)
    latents = [side.decode(side.encode(x)) for side, x in ((codec.k, keys), (codec.v, values))]
    found, _ = attention.attend(query, latents[0], latents[1], codec, HEAD_DIM**-0.5)
    torch.testing.assert_close(found.double(), exact(query, keys, values, HEAD_DIM**-0.5), rtol=2e-3, atol=2e-3)


def test_padding_slots_write_nothing() -> None:
    codec = layer_codec("4", "4")
    layout = PageLayout.of(codec.spec, 16)
    memory = torch.zeros(2, HEADS, layout.record_bytes, dtype=torch.uint8)
    x = torch.randn(3, HEADS, HEAD_DIM)
    pages.append(memory, layout, codec, x, x, torch.tensor([-1, -1, -1]))
    assert not memory.any()


def test_pages_may_be_strided_over_blocks() -> None:
    """An engine packs the pages of several layers into one block; only the record is contiguous."""
    codec = layer_codec("4", "2")
    layout = PageLayout.of(codec.spec, 16)
    packed = torch.zeros(4, 3, HEADS * layout.record_bytes, dtype=torch.uint8)
    strided = packed[:, 1].view(4, HEADS, layout.record_bytes)
    x = torch.randn(20, HEADS, HEAD_DIM)
    pages.append(strided, layout, codec, x, x, torch.arange(20) + 16)
    assert not packed[:, 0].any()
    assert not packed[:, 2].any()
    contiguous = torch.zeros(4, HEADS, layout.record_bytes, dtype=torch.uint8)
    pages.append(contiguous, layout, codec, x, x, torch.arange(20) + 16)
    assert torch.equal(strided, contiguous)


def test_tensors_round_trip_and_are_checked() -> None:
    codec = layer_codec("banded", "4")
    spec = CodecSpec((None, codec.spec))
    tensors = to_tensors([None, codec])
    restored = from_tensors(spec, tensors)
    assert restored[0] is None
    assert isinstance(restored[1], HeadsCodec)
    assert torch.equal(restored[1].k.encode_HDR, codec.k.encode_HDR)
    with pytest.raises(ValueError, match=r"layers\.1\.v\.scale is missing"):
        from_tensors(spec, {name: t for name, t in tensors.items() if name != "layers.1.v.scale"})
    with pytest.raises(ValueError, match="shape"):
        from_tensors(spec, tensors | {"layers.1.k.mean": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match="not finite"):
        from_tensors(spec, tensors | {"layers.1.k.mean": torch.full((HEADS, HEAD_DIM), torch.nan)})
    with pytest.raises(ValueError, match="not positive"):
        from_tensors(spec, tensors | {"layers.1.k.scale": torch.zeros(HEADS, 24)})
