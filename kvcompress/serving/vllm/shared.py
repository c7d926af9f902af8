"""The attention backend of layers that share a latent.

A step's tokens are attended as they are, all earlier ones as stored: the step's latents are complete only when the
group's last layer has added its part to them. That layer encodes them and writes every layer's stripe into that
layer's own page, in the same step, so pages are final when it ends and prefix caching needs nothing more. Every layer
has an ordinary page of its own, found by its own block table; to read the latent, a layer reads all of them.

What a request is answered depends on where its prompt was cut (by chunks, a prefix hit or preemption) as far as an
exact token differs from its stored form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvcompress.codec.heads.codec import SideCodec
from kvcompress.codec.shared.codec import SharedCodec
from kvcompress.codec.shared.pages import SharedLayout
from kvcompress.codec.shared.spec import SharedSpec
from kvcompress.ops import gpu
from kvcompress.ops.rows import int32_rows
from kvcompress.ops.shared.attention import bind
from kvcompress.ops.shared.batch import Batch
from kvcompress.ops.shared.reference import SharedOp
from kvcompress.serving.vllm import compat
from kvcompress.serving.vllm.backend import (
    CompressedAttentionBackend,
    CompressedAttentionImpl,
    CompressedMetadata,
)


class SharedAttentionBackend(CompressedAttentionBackend):
    """Names the parts; metadata and layouts are those of the per-head backend."""

    @staticmethod
    def get_name() -> str:
        return compat.SHARED_BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[CompressedAttentionImpl]:
        return SharedAttentionImpl


@dataclass
class LayerGroup:
    """The layers of one group in this process, in order, and what they hand on within a step."""

    size: int
    layers: list[Any] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    specs: list[SharedSpec] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    """The running step's normalized latents as far as they are added up, by side `[tokens, R]`."""

    def join(self, layer: Any, name: str, spec: SharedSpec) -> None:
        assert len(self.layers) == spec.place < self.size, f"{name} comes out of order in its group {spec.group}"
        self.layers.append(layer)
        self.names.append(name)
        self.specs.append(spec)

    def metadata(self, place: int) -> CompressedMetadata:
        """The running step as the layer at a place sees it: in hybrid models layers differ in their block tables."""
        found: CompressedMetadata = compat.layer_metadata(self.names[place])
        return found

    def page_layout(self, place: int, kv_cache: Tensor) -> SharedLayout:
        """The layout of the layer at a place; the block size that counts is the allocated cache's."""
        return SharedLayout.of(self.specs[place], kv_cache.shape[2])


class SharedAttentionImpl(CompressedAttentionImpl):
    """Attention of one layer of a group."""

    _op: SharedOp
    group: LayerGroup

    def use_group(self, group: LayerGroup, spec: SharedSpec) -> None:
        """Join the group's other layers. The codec follows when weights are there."""
        self.group, self.place = group, spec.place

    def use_codec(self, codec: Any, device: torch.device, longest: int) -> None:
        self._op, self._longest = bind(codec, device), longest

    @property
    def codec(self) -> SharedCodec:
        """On the layer's device."""
        return self._op.plan.codec

    def latents(self, kv_cache: Tensor, block_1: Tensor) -> Sequence[Tensor]:
        records, tokens = self._records(self.place), kv_cache.shape[2]
        sides = ((records["k"], self.codec.spec.k), (records["v"], self.codec.spec.v))
        return [self._op.read(pages_NHSX, spec, block_1, tokens) for pages_NHSX, spec in sides]

    def _workspace(self, output: Tensor) -> int:
        return self._op.workspace_bytes(output.shape[0], self.num_heads, self._longest)

    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, batch: CompressedMetadata, output: Tensor
    ) -> None:
        """Add this layer's part to the step's latents, attend, and if the layer is the group's last one, store.

        Arguments as in the per-head backend; `kv_cache` is `uint8 [blocks, 1, tokens per block, bytes per token]`.
        """
        slots_T = batch.slot_mapping[: key.shape[0]]
        step = Step.of(batch, slots_T, kv_cache)
        self._add({"k": key, "v": value}, step.positions_T)
        places = range(self.group.size)
        pages = [self._records(place) for place in places]
        tables = [self._table(place) for place in places]
        k_places: Sequence[int] = places
        if isinstance(self.codec.k, SideCodec):
            k_places = [self.place]
            latent_THR = self.codec.k.latent(key)
            self._op.store(pages[self.place]["k"], self.codec.k.spec, latent_THR, self.codec.k.weight_HR, slots_T)
        self._op.attend(
            output,
            query,
            key,
            value,
            [pages[place]["k"] for place in k_places],
            [page["v"] for page in pages],
            Batch([tables[place] for place in k_places], tables, *step.numbers),
            self.scale,
            max_query_len=step.max_query_len,
        )
        if self.place == self.group.size - 1:
            self._store(pages, key.shape[0])

    def _add(self, step: dict[str, Tensor], positions_T: Tensor) -> None:
        for name, side in self.codec.shared_sides.items():
            part_TR = side.part(self.codec.states(name, step[name], positions_T))
            self.group.sums[name] = part_TR if self.place == 0 else self.group.sums[name] + part_TR

    def _store(self, pages: Sequence[dict[str, Tensor]], tokens: int) -> None:
        for name, side in self.codec.shared_sides.items():
            latent_TWR = self.group.sums.pop(name).unflatten(-1, side.scale_WR.shape)
            for place, records in enumerate(pages):
                slots_T, stripe = self.group.metadata(place).slot_mapping[:tokens], slice(place, place + 1)
                self._op.store(records[name], side.spec, latent_TWR[:, stripe], side.weight_WR[stripe], slots_T)

    def _table(self, place: int) -> Tensor:
        """Blocks of each request's tokens in the cache of the layer at a place."""
        return self.group.metadata(place).block_table

    def _records(self, place: int) -> dict[str, Tensor]:
        """Both sides' records in the pages of the layer at a place, as `ops.shared` takes them."""
        cache = self.group.layers[place].kv_cache
        layout, pages_NX = self.group.page_layout(place, cache), cache.view(cache.shape[0], -1)
        return {"k": layout.k.view(pages_NX), "v": layout.v.view(pages_NX)}


@dataclass(frozen=True)
class Step:
    """A step's numbers as `ops.shared.attend` takes them, the same in all layers that have their metadata in common."""

    positions_T: Tensor
    numbers: tuple[Tensor, Tensor, Tensor, Tensor]
    """As `ops.shared.batch.Batch` has them: query starts, lengths of requests and of what is stored, exact rows."""
    max_query_len: int

    @classmethod
    def of(cls, batch: CompressedMetadata, slots_T: Tensor, kv_cache: Tensor) -> Step:
        """Made once; where kernels read numbers on the device, they are brought there once."""
        found: Step | None = batch.derived.get(cls)
        if found is None:
            most = int(batch.query_starts.diff().max()) if len(batch.seq_lens) else 0
            stored_lens, exact_rows = step_tokens(batch, slots_T, kv_cache.shape[2])
            device = kv_cache.device if most <= gpu.MOST_QUERIES else torch.device("cpu")
            found = batch.derived[cls] = cls(
                positions_T=_positions(batch).to(kv_cache.device),
                numbers=(
                    int32_rows(batch.query_starts, device),
                    int32_rows(batch.seq_lens, device),
                    int32_rows(stored_lens, device),
                    int32_rows(exact_rows, device),
                ),
                max_query_len=most,
            )
        return found


def step_tokens(batch: CompressedMetadata, slots_T: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Which tokens a running step sees as they are: its own, and those that another of its requests is to store.

    A prompt may begin with blocks that another request of the step is about to fill: they are not stored yet. Only
    whole blocks are shared.

    Returns:
        How many tokens of each request come before the first such token, and for every token from there on, request
        after request, its row in the step; -1 for one that is stored.
    """
    starts_R, queries_R = batch.query_starts[:-1].long(), batch.query_starts.diff().long()
    before_R = batch.seq_lens.long() - queries_R
    whole_R = before_R // block_size
    table_RN = batch.block_table[: len(before_R), : int(whole_R.max()) if len(whole_R) else 0].cpu()
    running_RN = torch.isin(table_RN, slots_T.cpu() // block_size)
    running_RN &= torch.arange(table_RN.shape[1]) < whole_R[:, None]
    if not running_RN.any():
        return before_R, torch.arange(int(batch.query_starts[0]), int(batch.query_starts[-1]))
    sorted_T, row_T = slots_T.cpu().long().sort()
    stored, rows = before_R.clone(), []
    for request, (start, queries) in enumerate(zip(starts_R.tolist(), queries_R.tolist(), strict=True)):
        if running_RN[request].any():
            stored[request] = block_size * int(running_RN[request].nonzero()[0])
            position_T = torch.arange(int(stored[request]), int(before_R[request]))
            seen_T = batch.block_table[request].cpu().long()[position_T // block_size] * block_size
            seen_T += position_T % block_size
            place_T = torch.searchsorted(sorted_T, seen_T).clamp(max=len(sorted_T) - 1)
            rows.append(row_T[place_T].where(sorted_T[place_T] == seen_T, -1))
        rows.append(torch.arange(start, start + queries))
    return stored, torch.cat(rows)


def cache_spec(layer: SharedSpec, block_size: int) -> compat.FullAttentionSpec:
    """The cache spec of one layer of a group: one record per token, whatever is in it.

    Raises:
        ValueError: block_size is not a positive multiple of 16.
    """
    layout = SharedLayout.of(layer, block_size)
    spec = compat.FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=layer.num_kv_heads * layer.head_dim,
        dtype=torch.uint8,
        state_content_bytes=layer.bytes_per_token,
    )
    assert spec.page_size_bytes == layout.page_bytes
    return spec


def _positions(batch: CompressedMetadata) -> Tensor:
    """Positions of a step's tokens, request after request."""
    starts, lengths = batch.query_starts.tolist(), batch.seq_lens.tolist()
    ranges = [
        torch.arange(length - (stop - start), length)
        for length, start, stop in zip(lengths, starts, starts[1:], strict=False)
    ]
    return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)
