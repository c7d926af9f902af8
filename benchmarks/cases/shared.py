"""Layers that share a latent: a step of one of them on random codecs, and attention on it in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.cases.heads import POISON, bands, starts
from kvcompress.codec.bands import SideSpec
from kvcompress.codec.heads.codec import SideCodec
from kvcompress.codec.rope import Rope
from kvcompress.codec.shared.codec import SharedCodec, SharedSide
from kvcompress.codec.shared.pages import SharedLayout
from kvcompress.codec.shared.spec import SharedSpec
from kvcompress.ops.rows import int32_rows
from kvcompress.ops.shared.attention import bind
from kvcompress.ops.shared.call import SharedCall
from kvcompress.ops.shared.cpu import CpuShared

HALVES_BAR = 1e-3
"""Relative error of the CUDA kernels' output: decoders, keys, queries and weights are halves."""

CUDA_SIDES = [
    (bands((8, 24)), bands((8, 40))),
    (bands((4, 16)), bands((4, 24))),
    (bands((2, 24)), bands((2, 8))),
    (bands((8, 8), (4, 8), (2, 8)), bands((8, 16), (2, 24))),
    (bands((16, 24)), bands((16, 24))),
]


def random_side(spec: SideSpec, layers: int, heads: int, head_dim: int, generator: torch.Generator) -> SharedSide:
    rank = layers * spec.rank
    inverse_HRD = torch.randn(heads, rank, head_dim, generator=generator) / rank**0.5
    basis_HDR = torch.randn(heads, head_dim, rank, generator=generator) / (heads * head_dim) ** 0.5
    scale_WR = torch.linspace(2, 0.3, rank).view(layers, -1)
    return SharedSide(spec, torch.randn(heads, head_dim, generator=generator), basis_HDR, inverse_HRD, scale_WR)


@dataclass
class Group:
    """One layer's view of a step: the group's pages with everything unused poisoned, and the step's own tokens."""

    codec: SharedCodec
    k_records: list[Tensor]
    v_records: list[Tensor]
    k_tables: list[Tensor]
    v_tables: list[Tensor]
    keys_THD: Tensor
    values_THD: Tensor
    query_THD: Tensor
    query_lens: list[int]
    seq_lens: list[int]
    stored_lens: list[int]
    exact_rows: Tensor
    decoded: list[tuple[Tensor, Tensor]]
    """Keys and values of each request as attention is to see them, float64."""

    def attend(self, max_query_len: int | None = None, **settings: int) -> Tensor:
        """By whom `bind` chooses, prompts by the CPU's kernels too; settings are attributes of those."""
        op, call = bind(self.codec, self.query_THD.device), self.call(max_query_len)
        if isinstance(op, CpuShared):
            settings = {"expand_queries": 10**6, **settings}
        for name, number in settings.items():
            assert hasattr(op, name)
            setattr(op, name, number)
        op.attend(call)
        return call.output_THD

    def call(self, max_query_len: int | None = None) -> SharedCall:
        """The step's numbers are the host's."""
        numbers = (starts(self.query_lens), self.seq_lens, self.stored_lens, self.exact_rows)
        return SharedCall(
            torch.full_like(self.query_THD, torch.nan),
            self.query_THD,
            self.keys_THD,
            self.values_THD,
            self.k_records,
            self.v_records,
            self.k_tables,
            self.v_tables,
            *(int32_rows(each) for each in numbers),
            0.2,
            max_query_len,
        )

    def to(self, device: str) -> Group:
        """The same with everything that attention is given on a device."""
        moved = {
            name: [tensor.to(device) for tensor in getattr(self, name)]
            for name in ("k_records", "v_records", "k_tables", "v_tables")
        }
        tensors = {name: getattr(self, name).to(device) for name in ("keys_THD", "values_THD", "query_THD")}
        return replace(self, codec=self.codec.to(device), **moved, **tensors)

    def exact(self) -> Tensor:
        outputs, heads = [], self.codec.spec.num_kv_heads
        parts = self.query_THD.cpu().double().unflatten(1, (heads, -1)).split(self.query_lens)
        for query_QHGD, (keys_THD, values_THD) in zip(parts, self.decoded, strict=True):
            queries, length = query_QHGD.shape[0], keys_THD.shape[0]
            scores = torch.einsum("qhgd,thd->hgqt", query_QHGD, keys_THD) * 0.2
            seen = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hgqt,thd->qhgd", weights, values_THD).flatten(1, 2))
        return torch.cat(outputs)


def a_group(
    k: SideSpec,
    v: SideSpec,
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    share: str = "kv",
    layers: int = 3,
    heads: int = 2,
    head_dim: int = 32,
    query_heads: int = 8,
    dtype: torch.dtype = torch.float32,
    place: int = 1,
    turn: float = 1.0,
    size: float = 1.0,
) -> Group:
    """`turn`: how much faster keys turn than usual; `size`: of latents."""
    generator = torch.Generator().manual_seed(11)
    spec = SharedSpec(heads, head_dim, tuple(range(layers)), place, share, k, v)
    sides = {"v": random_side(v, layers, heads, head_dim, generator)}
    rope = None
    if share == "kv":
        sides["k"] = random_side(k, layers, heads, head_dim, generator)
        rope = Rope(turn * 10000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2)), torch.tensor([1.25]))
        codec = SharedCodec(spec, sides["k"], sides["v"], rope)
    else:
        basis_HDR = torch.linalg.qr(torch.randn(heads, head_dim, head_dim, generator=generator))[0][..., : k.rank]
        scale_HR = torch.linspace(2, 0.3, k.rank).expand(heads, -1).contiguous()
        mean_HD = torch.randn(heads, head_dim, generator=generator)
        codec = SharedCodec(spec, SideCodec(k, mean_HD, basis_HDR, basis_HDR.mT, scale_HR), sides["v"], None)
    total = sum(query_lens)
    keys_THD, values_THD = torch.randn(2, total, heads, head_dim, generator=generator).to(dtype)
    caches, tables, layouts = [], [], []
    for layer in range(layers):
        block_size = 32 if layer == 1 else 16  # layers of a hybrid model may differ
        layouts.append(SharedLayout.of(spec, block_size))
        counts = [-(-length // block_size) for length in seq_lens]
        numbers = torch.randperm(sum(counts) + 3, generator=generator)
        caches.append(torch.full((len(numbers), layouts[-1].page_bytes + 48), POISON, dtype=torch.uint8)[:, 16:-32])
        tables.append(torch.full((len(seq_lens), max(counts) + 2), -1, dtype=torch.int32))
        for request, (count, part) in enumerate(zip(counts, numbers[: sum(counts)].split(counts), strict=True)):
            tables[-1][request, :count] = part
    decoded, stored_lens, rows = [], [], []
    for request, (length, queries, first) in enumerate(zip(seq_lens, query_lens, starts(query_lens), strict=False)):
        stored = length - queries
        stored_lens.append(stored)
        own = slice(first, first + queries)
        rows.append(torch.arange(first, first + queries))
        seen = {}
        for name, side in codec.shared_sides.items():
            latent_TR = size * torch.randn(stored, side.basis_HDR.shape[2], generator=generator)
            encoded = side.encode(latent_TR)
            for layer in range(layers):
                part = getattr(layouts[layer], name)
                stripe = encoded.heads(layer, layer + 1)
                part.write(caches[layer], stripe, slots(tables[layer][request], stored, part.block_size))
            x_THD = torch.einsum("tr,hrd->thd", side.decode(encoded).double(), side.decode_HRD.double())
            x_THD = x_THD + side.mean_HD.double()
            if name == "k" and rope is not None:
                x_THD = rotate64(rope, x_THD)
            step_THD = keys_THD if name == "k" else values_THD
            seen[name] = torch.cat([x_THD, step_THD[own].double()])
        if share == "v":
            assert isinstance(codec.k, SideCodec)
            all_THD = torch.cat([torch.randn(stored, heads, head_dim, generator=generator), keys_THD[own].float()])
            found = codec.k.encode(all_THD)
            part = layouts[place].k
            part.write(caches[place], found, slots(tables[place][request], length, part.block_size))
            k_THR, decode_HRD = codec.k.decode(found).double(), codec.k.decode_HRD.double()
            seen["k"] = torch.einsum("thr,hrd->thd", k_THR, decode_HRD) + codec.k.mean_HD.double()
        decoded.append((seen["k"], seen["v"]))
    k_layers = range(layers) if share == "kv" else [place]
    query_THD = torch.randn(total, query_heads, head_dim, generator=generator).to(dtype)
    return Group(
        codec,
        [layouts[layer].k.view(caches[layer]) for layer in k_layers],
        [layouts[layer].v.view(caches[layer]) for layer in range(layers)],
        [tables[layer] for layer in k_layers],
        tables,
        keys_THD,
        values_THD,
        query_THD,
        list(query_lens),
        list(seq_lens),
        stored_lens,
        torch.cat(rows),
        decoded,
    )


def slots(table_N: Tensor, length: int, block_size: int) -> Tensor:
    token_T = torch.arange(length)
    return table_N.long()[token_T // block_size] * block_size + token_T % block_size


def rotate64(rope: Rope, x_THD: Tensor) -> Tensor:
    """By the model's float32 angles, otherwise in float64."""
    angle_TF = torch.arange(x_THD.shape[0]).float()[:, None] * rope.frequency_F
    cos, sin = angle_TF.double().cos()[:, None] * 1.25, angle_TF.double().sin()[:, None] * 1.25
    first, second = x_THD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
