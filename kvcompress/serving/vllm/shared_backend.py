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

from kvcompress.codec.scalar import Encoded
from kvcompress.codec.shared import SharedCodec
from kvcompress.codec.shared_pages import SharedLayout
from kvcompress.codec.shared_spec import SharedSpec
from kvcompress.ops.reference import SCORE_BYTES
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


@dataclass(frozen=True)
class _Running:
    """The slots of a step's tokens, sorted, and the row of each."""

    slots_T: Tensor
    rows_T: Tensor

    @classmethod
    def of(cls, slots_T: Tensor) -> _Running:
        return cls(*slots_T.long().sort())

    def rows(self, slots_T: Tensor) -> Tensor:
        """The step's row that goes to each of these slots, -1 for slots that it leaves alone."""
        place_T = torch.searchsorted(self.slots_T, slots_T).clamp(max=self.slots_T.shape[0] - 1)
        return self.rows_T[place_T].where(self.slots_T[place_T] == slots_T, -1)


class SharedAttentionImpl(CompressedAttentionImpl):
    """Attention of one layer of a group."""

    codec: SharedCodec
    group: LayerGroup

    def use_group(self, group: LayerGroup, spec: SharedSpec) -> None:
        """Join the group's other layers. The codec follows when weights are there."""
        self.group, self.place = group, spec.place

    def use_codec(self, codec: Any, longest: int) -> None:
        """Set the codec, on the layer's device, for requests of up to `longest` tokens."""
        assert isinstance(codec, SharedCodec)
        self.codec = codec
        self._workspace_bytes = workspace_bytes(codec.spec, self.num_heads, longest)

    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, batch: CompressedMetadata, output: Tensor
    ) -> None:
        """Add this layer's part to the step's latents, attend, and if the layer is the group's last one, store.

        Arguments as in the per-head backend; `kv_cache` is `uint8 [blocks, 1, tokens per block, bytes per token]`.
        """
        slots_T = batch.slot_mapping[: key.shape[0]]
        starts, lengths = batch.query_starts.tolist(), batch.seq_lens.tolist()
        step = {"k": key, "v": value}
        positions_T = _positions(starts, lengths).to(key.device)
        self._add(step, positions_T)
        if "k" not in self.codec.shared_sides:
            layout = self.group.page_layout(self.place, kv_cache)
            layout.k.write(_pages(kv_cache), self.codec.k.encode(step["k"]), slots_T)
        running = _Running.of(slots_T)
        for request, length in enumerate(lengths):
            rows = slice(starts[request], starts[request + 1])
            if rows.start == rows.stop:
                continue
            row_T = running.rows(self._slots(request, length - (rows.stop - rows.start)))
            keys, values = (self._read(side, x_THD, rows, row_T, request) for side, x_THD in step.items())
            _attend(output[rows], query[rows], keys, values, self.scale)
        if self.place == self.group.size - 1:
            self._store(key.shape[0])

    def _add(self, step: dict[str, Tensor], positions_T: Tensor) -> None:
        for side, shared in self.codec.shared_sides.items():
            part_TR = shared.part(self.codec.states(side, step[side], positions_T))
            self.group.sums[side] = part_TR if self.place == 0 else self.group.sums[side] + part_TR

    def _slots(self, request: int, length: int) -> Tensor:
        """Where the first tokens of a request lie in this layer's cache."""
        _, blocks_N, layout = self._pages_of(self.place, request, length)
        positions_T, size = torch.arange(length, device=blocks_N.device), layout.v.block_size
        return blocks_N[positions_T // size] * size + positions_T % size

    def _read(self, side: str, step_THD: Tensor, rows: slice, row_T: Tensor, request: int) -> Tensor:
        """Keys or values of all tokens of a request `[tokens, KV heads, head_dim]`, float32.

        Args:
            step_THD: those of the running step's tokens, all requests.
            rows: the request's own among them.
            row_T: for each token before them, its row in `step_THD`, -1 where it is of an earlier step.
        """
        shared = self.codec.shared_sides.get(side)
        stored = row_T.shape[0]
        if shared is None:
            length = stored + rows.stop - rows.start
            pages_NX, blocks_N, layout = self._pages_of(self.place, request, length)
            return self.codec.k.reconstruct(layout.k.read(pages_NX, blocks_N, length))  # type: ignore[union-attr]
        own_THD = step_THD[rows].float()
        if stored == 0:
            return own_THD
        stripes = []
        for place in range(self.group.size):
            pages_NX, blocks_N, layout = self._pages_of(place, request, stored)
            stripes.append((layout.k if side == "k" else layout.v).read(pages_NX, blocks_N, stored))
        latent_TR = shared.decode(Encoded.concatenate(stripes))
        read_THD = self.codec.read(side, latent_TR, torch.arange(stored, device=own_THD.device))
        # A prompt may begin with blocks that another request of the step is about to fill: they are not stored yet.
        before_THD = torch.where(row_T[:, None, None] < 0, read_THD, step_THD[row_T].float())
        return torch.cat([before_THD, own_THD])

    def _store(self, tokens: int) -> None:
        for side, shared in self.codec.shared_sides.items():
            encoded = shared.encode(self.group.sums.pop(side))
            for place, layer in enumerate(self.group.layers):
                layout = self.group.page_layout(place, layer.kv_cache)
                slots_T = self.group.metadata(place).slot_mapping[:tokens]
                part = layout.k if side == "k" else layout.v
                part.write(_pages(layer.kv_cache), encoded.heads(place, place + 1), slots_T)

    def _pages_of(self, place: int, request: int, length: int) -> tuple[Tensor, Tensor, SharedLayout]:
        """The pages of the layer at a place, and the blocks of a request's first tokens in them."""
        cache = self.group.layers[place].kv_cache
        layout = self.group.page_layout(place, cache)
        blocks = -(-length // layout.v.block_size)
        return _pages(cache), self.group.metadata(place).block_table[request, :blocks].long(), layout


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


def workspace_bytes(spec: SharedSpec, num_heads: int, longest: int) -> int:
    """Bytes that attention takes at most beside its arguments, for requests of `longest` tokens."""
    channels = len(spec.group) * (spec.k.rank + spec.v.rank) + 4 * spec.num_kv_heads * spec.head_dim
    scores = max(SCORE_BYTES, num_heads * longest * torch.float32.itemsize)
    return 3 * (longest * channels * torch.float32.itemsize + scores)


def _positions(starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Positions of a step's tokens, request after request."""
    ranges = [
        torch.arange(length - (stop - start), length)
        for length, start, stop in zip(lengths, starts, starts[1:], strict=False)
    ]
    return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)


def _pages(kv_cache: Tensor) -> Tensor:
    """`uint8 [blocks, page_bytes]`; blocks may be strided."""
    return kv_cache.view(kv_cache.shape[0], -1)


def _attend(output_QHD: Tensor, query_QHD: Tensor, keys_THD: Tensor, values_THD: Tensor, scale: float) -> None:
    """Causal attention of the newest tokens over all, in float32, a bounded number of queries at a time."""
    queries, tokens = query_QHD.shape[0], keys_THD.shape[0]
    keys_HTD, values_HTD = keys_THD.transpose(0, 1), values_THD.transpose(0, 1)
    step = max(1, SCORE_BYTES // (4 * query_QHD.shape[1] * tokens))
    for first in range(0, queries, step):
        last = min(first + step, queries)
        visible = tokens - (queries - last)
        seen = torch.ones(last - first, visible, dtype=torch.bool, device=keys_THD.device).tril(
            visible - (last - first)
        )
        mixed_HQD = torch.nn.functional.scaled_dot_product_attention(
            query_QHD[first:last].transpose(0, 1).float(),
            keys_HTD[:, :visible],
            values_HTD[:, :visible],
            attn_mask=seen,
            scale=scale,
            enable_gqa=True,
        )
        output_QHD[first:last] = mixed_HQD.transpose(0, 1).to(output_QHD.dtype)
