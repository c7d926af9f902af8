"""Batches as vLLM's runner describes them on a GPU: the same tensors step after step, with other numbers in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcompress.codec.heads.codec import HeadsCodec
from kvcompress.serving.vllm.heads import DeviceHeadsImpl, cache_spec
from kvcompress.serving.vllm.metadata import DeviceBuilder
from tests.serving.vllm import engines

HEADS, KV_HEADS, BLOCK = 6, 2, 64
REQUESTS, COLUMNS, NUM_BLOCKS, MOST_TOKENS = 5, 5, 28, 320
POISON = 0xFF
"""As halves: NaN."""


class DeviceEngine:
    """One layer, its cache and the runner's tensors. Request r has row r of `tables`; block 0 is nobody's."""

    def __init__(self, codec: HeadsCodec, dtype: torch.dtype = torch.float32) -> None:
        self.codec, self.dtype = codec, dtype
        self.head_dim = codec.spec.head_dim
        self.impl = DeviceHeadsImpl(HEADS, self.head_dim, self.head_dim**-0.5, KV_HEADS)
        self.impl.use_codec(codec, torch.device("cpu"), COLUMNS * BLOCK)
        content = cache_spec(codec.spec, BLOCK).state_content_size_bytes
        # Another layer's page lies between two of ours, as in vLLM's block-outermost layout.
        packed = torch.full((NUM_BLOCKS, 2, KV_HEADS, BLOCK, content), POISON, dtype=torch.uint8)
        self.cache, self.other = packed[:, 0], packed[:, 1]
        self.generator = torch.Generator().manual_seed(3)
        numbers = 1 + torch.randperm(NUM_BLOCKS - 1, generator=self.generator)[: REQUESTS * COLUMNS]
        self.tables = numbers.view(REQUESTS, COLUMNS).int()
        self.builder = DeviceBuilder(None, ["layer"], None, torch.device("cpu"))
        self.history: dict[int, tuple[Tensor, Tensor]] = {}
        # The device's, and the host's copies.
        self.starts, self.lengths = torch.zeros(REQUESTS + 1, dtype=torch.int32), torch.zeros(REQUESTS).int()
        self.table = torch.zeros(REQUESTS, COLUMNS, dtype=torch.int32)
        self.slots = torch.zeros(MOST_TOKENS, dtype=torch.int64)
        self.host_starts, self.bounds = self.starts.clone(), self.lengths.clone()
        rows = (MOST_TOKENS, HEADS, self.head_dim), *[(MOST_TOKENS, KV_HEADS, self.head_dim)] * 2
        self.query, self.key, self.value = (torch.zeros(shape, dtype=dtype) for shape in rows)
        self.output = torch.zeros_like(self.query)

    def prepare(self, new_tokens: dict[int, int], requests: int | None = None, tokens: int | None = None) -> Any:
        """The runner's description of a step with so many new tokens of each request; queries, keys and values drawn.

        Args:
            requests, tokens: that a captured graph has room for; what is left of them is padding.
        """
        total, real = sum(new_tokens.values()), len(new_tokens)
        requests, tokens = requests or real, tokens or total
        for rows in (self.query, self.key, self.value):
            rows[:tokens] = torch.randn(rows[:tokens].shape, generator=self.generator).to(self.dtype)
        self.slots.fill_(-1)
        self.lengths.zero_()
        self.table.zero_()
        start = 0
        for row, (request, count) in enumerate(new_tokens.items()):
            old_key, old_value = self.history.get(request, (self.key[:0], self.value[:0]))
            step = slice(start, start + count)
            positions = torch.arange(len(old_key), len(old_key) + count)
            self.slots[step] = self.tables[request].long()[positions // BLOCK] * BLOCK + positions % BLOCK
            self.history[request] = torch.cat([old_key, self.key[step]]), torch.cat([old_value, self.value[step]])
            self.starts[row], self.lengths[row], self.table[row] = start, len(old_key) + count, self.tables[request]
            start += count
        self.starts[real:] = start
        self.host_starts.copy_(self.starts)
        self.bounds.copy_(self.lengths)
        return engines.batch(
            self.starts[: requests + 1],
            self.lengths[:requests],
            self.slots[:tokens],
            self.table[:requests],
            max(new_tokens.values()),
            query_start_loc_cpu=self.host_starts[: requests + 1],
            seq_lens_cpu_upper_bound=self.bounds[:requests],
        )

    def run(self, metadata: Any, tokens: int) -> None:
        """One forward call on the runner's tensors."""
        self.output.fill_(torch.nan)
        rows = (self.query[:tokens], self.key[:tokens], self.value[:tokens])
        self.impl.forward(None, *rows, self.cache, metadata, self.output[:tokens])

    def step(self, new_tokens: dict[int, int], padding: int = 0) -> None:
        """Prepare, describe, run and check a step; `padding` tokens and one request come after it."""
        tokens = sum(new_tokens.values()) + padding
        batch = self.prepare(new_tokens, len(new_tokens) + bool(padding), tokens)
        self.run(self.builder.build(0, batch), tokens)

    def outputs(self, new_tokens: dict[int, int]) -> tuple[Tensor, Tensor]:
        """What was answered, and float64 attention over every token of the request, encoded and decoded once."""
        expected, start = [], 0
        for request, count in new_tokens.items():
            expected.append(self._exact(request, self.query[start : start + count]))
            start += count
        return self.output[:start].double(), torch.cat(expected)

    def _exact(self, request: int, query_QHD: Tensor) -> Tensor:
        key, value = (
            side.reconstruct(side.encode(x_THD)).double().repeat_interleave(HEADS // KV_HEADS, 1)
            for side, x_THD in zip((self.codec.k, self.codec.v), self.history[request], strict=True)
        )
        scores = torch.einsum("qhd,thd->hqt", query_QHD.double(), key) * self.head_dim**-0.5
        visible = torch.ones(len(query_QHD), len(key), dtype=torch.bool).tril(len(key) - len(query_QHD))
        return torch.einsum("hqt,thd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), value)

    @property
    def host(self) -> Sequence[Tensor]:
        """The tensors that are not the device's."""
        return self.host_starts, self.bounds
