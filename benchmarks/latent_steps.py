"""Decode steps of `cpu_decode.py` on caches without pages of their own per head: MLA latents, and xkv's shared ones.

Each comes twice, on the kernels and on the torch code that specifies them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvcompress.codec.bands import Band, SideSpec
from kvcompress.codec.groups import Share
from kvcompress.codec.heads.codec import SideCodec
from kvcompress.codec.latent.codec import LatentCodec
from kvcompress.codec.latent.spec import LatentSpec
from kvcompress.codec.rope import Rope
from kvcompress.codec.shared.codec import SharedCodec, SharedSide
from kvcompress.codec.shared.pages import SharedLayout
from kvcompress.codec.shared.spec import SharedSpec
from kvcompress.ops.call import Call
from kvcompress.ops.latent.attention import bind as bind_latent
from kvcompress.ops.latent.reference import LatentOp
from kvcompress.ops.shared.attention import bind as bind_shared
from kvcompress.ops.shared.call import SharedCall
from kvcompress.ops.shared.reference import SharedOp

Step = Callable[[int], None]

IN_TORCH = " in torch"
"""Ends the name of a method that runs on the torch code which the kernels replace."""

MLA_RANK, MLA_ROPE = 512, 64
XKV_GROUP, XKV_K_RANK, XKV_V_RANK = 4, 384, 576
"""Layers of a group, and channels of the group's latents."""


def mla_steps(heads: int, context: int, table_RN: Tensor, block_size: int, copies: int) -> dict[str, Step]:
    """bf16 latents of a TransMLA layer."""
    batch, channels = table_RN.shape[0], MLA_RANK + MLA_ROPE
    pages_NSC = torch.randn(table_RN.numel(), block_size, channels, dtype=torch.bfloat16)
    caches = [pages_NSC] + [pages_NSC.clone() for _ in range(copies - 1)]
    query_THC = torch.randn(batch, heads, channels, dtype=torch.bfloat16)
    output_THR = torch.empty(batch, heads, MLA_RANK, dtype=torch.bfloat16)
    key_TC = torch.randn(batch, channels, dtype=torch.bfloat16)
    slots_T = table_RN[:, -1].long() * block_size
    starts_R, lengths_R = torch.arange(batch + 1, dtype=torch.int32), torch.full((batch,), context, dtype=torch.int32)
    call = Call(output_THR, query_THC, table_RN, starts_R, lengths_R, channels**-0.5)
    op = bind_latent(LatentCodec(LatentSpec(channels, MLA_RANK, pages_NSC.element_size())), "cpu", pages_NSC.dtype)

    def attend(op: LatentOp) -> Step:
        return lambda copy: op.attend(call, caches[copy])

    def append(copy: int) -> None:
        op.append(caches[copy], key_TC, slots_T)

    return {"mla bf16": attend(op), f"mla bf16{IN_TORCH}": attend(LatentOp()), "append mla": append}


def shared_steps(
    bits: int,
    share: Share,
    query_THD: Tensor,
    kv_heads: int,
    context: int,
    table_RN: Tensor,
    block_size: int,
    copies: int,
) -> dict[str, Step]:
    """One layer of an xkv group; its latents, of all of the group's layers, are read from their pages."""
    codec = _shared_codec(bits, share, kv_heads, query_THD.shape[2])
    op, layout = bind_shared(codec, "cpu"), SharedLayout.of(codec.spec, block_size)
    batch, blocks = query_THD.shape[0], table_RN.numel()
    pages_WNX = torch.zeros(XKV_GROUP, blocks, layout.page_bytes, dtype=torch.uint8)
    for start in range(0, blocks * block_size, 4096):
        slots_T = torch.arange(start, min(start + 4096, blocks * block_size))
        for name in ("k", "v"):
            side, place = getattr(codec, name), getattr(layout, name)
            latent_THR = torch.randn(len(slots_T), place.records, side.spec.rank)
            for page_NX in pages_WNX:
                weight_HR = torch.ones(place.records, side.spec.rank)
                op.store(place.view(page_NX), side.spec, latent_THR, weight_HR, slots_T)
    caches = [pages_WNX] + [pages_WNX.clone() for _ in range(copies - 1)]
    own_2THD = torch.randn(2, batch, kv_heads, query_THD.shape[2], dtype=query_THD.dtype)
    rows = (torch.empty_like(query_THD), query_THD, *own_2THD)
    row_T = torch.arange(batch + 1, dtype=torch.int32)
    lengths_R = torch.full((batch,), context, dtype=torch.int32)
    numbers = (row_T, lengths_R, lengths_R - 1, row_T[:-1])
    scale = query_THD.shape[2] ** -0.5

    def attend(op: SharedOp) -> Step:
        def step(copy: int) -> None:
            k_pages = caches[copy] if share == "kv" else caches[copy][:1]
            records = [layout.k.view(page) for page in k_pages], [layout.v.view(page) for page in caches[copy]]
            tables = [table_RN] * len(k_pages), [table_RN] * XKV_GROUP
            op.attend(SharedCall(*rows, *records, *tables, *numbers, scale))

        return step

    name = f"xkv {share} {bits}-bit"
    return {name: attend(op), f"{name}{IN_TORCH}": attend(SharedOp(codec))}


def _shared_codec(bits: int, share: Share, heads: int, head_dim: int) -> SharedCodec:
    def side(rank: int) -> SharedSide:
        spec = SideSpec((Band(bits, rank // XKV_GROUP),))
        mean_HD, scale_WR = torch.randn(heads, head_dim), torch.linspace(2, 0.3, rank).view(XKV_GROUP, -1)
        basis_HDR = torch.linalg.qr(torch.randn(heads * head_dim, rank))[0].view(heads, head_dim, rank)
        return SharedSide(spec, mean_HD, basis_HDR, basis_HDR.mT.contiguous(), scale_WR)

    v, group = side(XKV_V_RANK), tuple(range(XKV_GROUP))
    if share == "kv":
        k = side(XKV_K_RANK)
        rope = Rope(500_000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2)), torch.ones(1))
        return SharedCodec(SharedSpec(heads, head_dim, group, 0, share, k.spec, v.spec), k, v, rope)
    basis_HDR = torch.linalg.qr(torch.randn(heads, head_dim, head_dim))[0].contiguous()
    scale_HR = torch.linspace(2, 0.3, head_dim).expand(heads, -1).contiguous()
    own = SideSpec((Band(bits, head_dim),))
    k_own = SideCodec(own, torch.randn(heads, head_dim), basis_HDR, basis_HDR.mT.contiguous(), scale_HR)
    return SharedCodec(SharedSpec(heads, head_dim, group, 0, share, own, v.spec), k_own, v, None)
