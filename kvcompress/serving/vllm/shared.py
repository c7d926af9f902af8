"""Form `shared` in vLLM: layers that share a latent.

A step's tokens are attended as they are, all earlier ones as stored: the step's latents are complete only when the
group's last layer has added its part to them. That layer encodes them and writes every layer's stripe into that
layer's own page, in the same step, so pages are final when it ends and prefix caching needs nothing more. Every layer
has an ordinary page of its own, found by its own block table; to read the latent, a layer reads all of them.

What a request is answered depends on where its prompt was cut (by chunks, a prefix hit or preemption) as far as an
exact token differs from its stored form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress.codec.heads.codec import SideCodec
from kvcompress.codec.rope import Rope
from kvcompress.codec.shared.codec import SharedCodec
from kvcompress.codec.shared.pages import SharedLayout
from kvcompress.codec.shared.spec import SharedSpec
from kvcompress.codec.spec import CodecSpec
from kvcompress.ops import gpu
from kvcompress.ops.rows import int32_rows
from kvcompress.ops.shared.attention import bind
from kvcompress.ops.shared.call import SharedCall
from kvcompress.ops.shared.reference import SharedOp
from kvcompress.serving.vllm import compat
from kvcompress.serving.vllm.metadata import HostBuilder, Step


def check(engine: compat.Engine, codec: CodecSpec) -> None:
    """Refuse what layers that share a latent cannot do here.

    Raises:
        ValueError: naming the option or the setting.
    """
    for layer in codec.layers:
        if isinstance(layer, SharedSpec) and (layer.sink or layer.recent):
            raise ValueError(
                f"the codec keeps the first {layer.sink} and the newest {layer.recent} tokens as they are, which pages "
                "of one size per token cannot; serve it through transformers, or compress with sink: 0 and recent: 0"
            )
    for kind, reason in (
        ("tensor", "the latent that layers share is of all KV heads and is not divided over ranks"),
        ("pipeline", "layers that share a latent must run in one process"),
    ):
        if (size := getattr(engine, f"{kind}_parallel_size")) > 1:
            raise ValueError(f"found --{kind}-parallel-size {size}; {reason}; use 1, or more replicas")
    if engine.ubatching:
        raise ValueError("found --enable-dbo; layers that share a latent run a step in one piece; leave it off")


def attach(layer: compat.Layer, codec: SharedCodec, engine: compat.Engine, members: list[Any]) -> None:
    """Give an attention layer its implementation and its cache spec, and let it join the others of its group.

    Raises:
        ValueError: the engine rotates keys otherwise than when the codec was made, as by --hf-overrides.
    """
    if codec.rope is not None and not codec.rope.same(Rope.of(engine.text_config)):
        raise ValueError(
            f"{layer.name}'s codec was made for another rotary embedding (RoPE) than the engine is asked to use; leave "
            "rope parameters as they are in config.json, or compress the model again with them"
        )
    spec = codec.spec
    impl = SharedImpl(layer, spec, members)
    compat.attach(layer, SharedBackend, impl, lambda block_size: cache_spec(spec, block_size))


def cache_spec(layer: SharedSpec, block_size: int) -> compat.FullAttentionSpec:
    """The cache spec of one layer of a group: one record per token, whatever is in it.

    Raises:
        ValueError: block_size is not a positive multiple of 16.
    """
    layout = SharedLayout.of(layer, block_size)
    spec = compat.full_attention(block_size, 1, layer.num_kv_heads * layer.head_dim, layer.bytes_per_token)
    assert spec.page_size_bytes == layout.page_bytes
    return spec


class SharedImpl(compat.Implementation):
    """Attention of one layer of a group."""

    op: SharedOp

    def __init__(self, layer: compat.Layer, spec: SharedSpec, members: list[SharedImpl]) -> None:
        """
        Args:
            members: the group's layers before this one, in order; it joins them.
        """
        super().__init__(layer.num_heads, layer.head_size, layer.scale, layer.num_kv_heads)
        assert len(members) == spec.place < len(spec.group), f"{layer.name} comes out of order in its group"
        self.layer, self.spec, self.members = layer, spec, members
        self.sums: dict[str, Tensor] = {}
        """First layer of the group: the running step's normalized latents as far as they are added up, by side."""
        members.append(self)

    def use_codec(self, codec: SharedCodec, device: torch.device, longest: int) -> None:
        """Bind the codec to the layer's device, for requests of up to `longest` tokens."""
        self.op, self._longest = bind(codec, device), longest

    @property
    def codec(self) -> SharedCodec:
        """On the layer's device."""
        return self.op.plan.codec

    def run(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, step: Step, output: Tensor) -> None:
        """Add this layer's part to the step's latents, attend, and if the layer is the group's last one, store.

        Args:
            kv_cache: `uint8 [blocks, 1, tokens per block, bytes per token]`.
        """
        slots_T = step.slot_mapping[: key.shape[0]]
        numbers = Numbers.of(step, slots_T, kv_cache)
        self._add({"k": key, "v": value}, numbers.positions_T)
        pages = [member.records() for member in self.members]
        tables = [member.metadata.block_table for member in self.members]
        k_places: Sequence[int] = range(len(pages))
        if isinstance(self.codec.k, SideCodec):
            k_places = [self.spec.place]
            latent_THR, records = self.codec.k.latent(key), pages[self.spec.place]["k"]
            self.op.store(records, self.spec.k, latent_THR, self.codec.k.weight_HR, slots_T)
        call = SharedCall(
            output,
            query,
            key,
            value,
            [pages[place]["k"] for place in k_places],
            [page["v"] for page in pages],
            [tables[place] for place in k_places],
            tables,
            *numbers.of_requests,
            self.scale,
            numbers.max_query_len,
        )
        self.op.attend(call)
        if self is self.members[-1]:
            self._store(pages, key.shape[0])

    def workspace_bytes(self, output: Tensor) -> int:
        return self.op.workspace_bytes(output.shape[0], self.num_heads, self._longest)

    def latents(self, kv_cache: Tensor, block_1: Tensor) -> Sequence[Tensor]:
        records, tokens = self.records(), kv_cache.shape[2]
        sides = ((records["k"], self.spec.k), (records["v"], self.spec.v))
        return [self.op.read(pages_NHSX, spec, block_1, tokens) for pages_NHSX, spec in sides]

    @property
    def metadata(self) -> Step:
        """The running step as this layer sees it: in hybrid models layers differ in their block tables."""
        found: Step = compat.layer_metadata(self.layer.name)
        return found

    def records(self) -> dict[str, Tensor]:
        """Both sides' records in the layer's pages, as `ops.shared` takes them."""
        # The block size that counts is the allocated cache's.
        layout = SharedLayout.of(self.spec, self.layer.cache.shape[2])
        pages_NX = self.layer.cache.view(self.layer.cache.shape[0], -1)
        return {"k": layout.k.view(pages_NX), "v": layout.v.view(pages_NX)}

    def _add(self, step: dict[str, Tensor], positions_T: Tensor) -> None:
        sums = self.members[0].sums
        for name, side in self.codec.shared_sides.items():
            part_TR = side.part(self.codec.states(name, step[name], positions_T))
            sums[name] = part_TR if self is self.members[0] else sums[name] + part_TR

    def _store(self, pages: Sequence[dict[str, Tensor]], tokens: int) -> None:
        for name, side in self.codec.shared_sides.items():
            latent_TWR = self.members[0].sums.pop(name).unflatten(-1, side.scale_WR.shape)
            for place, (member, records) in enumerate(zip(self.members, pages, strict=True)):
                slots_T, stripe = member.metadata.slot_mapping[:tokens], slice(place, place + 1)
                self.op.store(records[name], side.spec, latent_TWR[:, stripe], side.weight_WR[stripe], slots_T)


class SharedBackend(compat.Backend):
    name = "KVCOMPRESS_SHARED"
    implementation, builder = SharedImpl, HostBuilder


@dataclass(frozen=True)
class Numbers:
    """A step's numbers as `ops.shared.attend` takes them, the same in all layers that have their metadata in common."""

    positions_T: Tensor
    of_requests: tuple[Tensor, Tensor, Tensor, Tensor]
    """As `ops.shared.call.SharedCall` has them: query starts, lengths of requests and of what is stored, exact rows."""
    max_query_len: int

    @classmethod
    def of(cls, step: Step, slots_T: Tensor, kv_cache: Tensor) -> Numbers:
        """Made once; where kernels read numbers on the device, they are brought there once."""
        found: Numbers | None = step.derived.get(cls)
        if found is None:
            most = int(step.query_starts.diff().max()) if len(step.seq_lens) else 0
            stored_lens, exact_rows = step_tokens(step, slots_T, kv_cache.shape[2])
            device = kv_cache.device if most <= gpu.MOST_QUERIES else torch.device("cpu")
            found = step.derived[cls] = cls(
                positions_T=_positions(step).to(kv_cache.device),
                of_requests=(
                    int32_rows(step.query_starts, device),
                    int32_rows(step.seq_lens, device),
                    int32_rows(stored_lens, device),
                    int32_rows(exact_rows, device),
                ),
                max_query_len=most,
            )
        return found


def step_tokens(step: Step, slots_T: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Which tokens a running step sees as they are: its own, and those that another of its requests is to store.

    A prompt may begin with blocks that another request of the step is about to fill: they are not stored yet. Only
    whole blocks are shared.

    Returns:
        How many tokens of each request come before the first such token, and for every token from there on, request
        after request, its row in the step; -1 for one that is stored.
    """
    starts_R, queries_R = step.query_starts[:-1].long(), step.query_starts.diff().long()
    before_R = step.seq_lens.long() - queries_R
    whole_R = before_R // block_size
    table_RN = step.block_table[: len(before_R), : int(whole_R.max()) if len(whole_R) else 0].cpu()
    running_RN = torch.isin(table_RN, slots_T.cpu() // block_size)
    running_RN &= torch.arange(table_RN.shape[1]) < whole_R[:, None]
    if not running_RN.any():
        return before_R, torch.arange(int(step.query_starts[0]), int(step.query_starts[-1]))
    sorted_T, row_T = slots_T.cpu().long().sort()
    stored, rows = before_R.clone(), []
    for request, (start, queries) in enumerate(zip(starts_R.tolist(), queries_R.tolist(), strict=True)):
        if running_RN[request].any():
            stored[request] = block_size * int(running_RN[request].nonzero()[0])
            position_T = torch.arange(int(stored[request]), int(before_R[request]))
            seen_T = step.block_table[request].cpu().long()[position_T // block_size] * block_size
            seen_T += position_T % block_size
            place_T = torch.searchsorted(sorted_T, seen_T).clamp(max=len(sorted_T) - 1)
            rows.append(row_T[place_T].where(sorted_T[place_T] == seen_T, -1))
        rows.append(torch.arange(start, start + queries))
    return stored, torch.cat(rows)


def _positions(step: Step) -> Tensor:
    """Positions of a step's tokens, request after request."""
    starts, lengths = step.query_starts.tolist(), step.seq_lens.tolist()
    ranges = [
        torch.arange(length - (stop - start), length)
        for length, start, stop in zip(lengths, starts, starts[1:], strict=False)
    ]
    return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)
