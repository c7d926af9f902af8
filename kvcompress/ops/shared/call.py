"""What attention is asked where layers share a latent, and its runs of requests that are attended in the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from kvcompress.ops.interface.common import Batch
from kvcompress.ops.interface.shared import Exact
from kvcompress.ops.rows import batch_struct, int32_rows, rows_struct


@dataclass
class SharedCall:
    """Causal attention of every request's newest tokens over all its tokens.

    A request's first tokens are attended as they are stored, the others as they are: rows of the running step. Keys of
    the layer's own are all attended as stored. Numbers are int32.
    """

    output_THD: Tensor
    """The result, written in place `[tokens, query heads, head_dim]`."""
    query_THD: Tensor
    """Post-RoPE queries of all requests; float32, bfloat16 or float16; may be padded at the end."""
    keys_THD: Tensor
    """The step's own `[tokens, KV heads, head_dim]`, after RoPE."""
    values_THD: Tensor
    k_records: Sequence[Tensor]
    """One per layer of the group; keys of the layer's own: its records alone."""
    v_records: Sequence[Tensor]
    k_tables: Sequence[Tensor]
    """For each of the key records block numbers `[requests, blocks]` of each request's tokens, in order."""
    v_tables: Sequence[Tensor]
    query_starts: Tensor
    """Where each request's queries begin, and the end of the last `[requests + 1]`."""
    seq_lens: Tensor
    """Tokens of each request, its queries' own included `[requests]`."""
    stored_lens: Tensor
    """How many of them are attended as they are stored `[requests]`."""
    exact_rows: Tensor
    """For each of the others, request after request, its row in the step's keys and values; -1 where it is as it is
    stored after all."""
    softmax_scale: float
    """Usually head_dim ** -0.5."""
    max_query_len: int | None = None
    """The most queries of a request, for a GPU: its kernels read lengths on the device, and start enough threads for
    any lengths."""

    def on(self, device: torch.device | str) -> Self:
        """With its numbers on a device, as kernels read them."""
        return replace(
            self,
            k_tables=[int32_rows(table_RN, device) for table_RN in self.k_tables],
            v_tables=[int32_rows(table_RN, device) for table_RN in self.v_tables],
            query_starts=int32_rows(self.query_starts, device),
            seq_lens=int32_rows(self.seq_lens, device),
            stored_lens=int32_rows(self.stored_lens, device),
            exact_rows=int32_rows(self.exact_rows, device),
        )

    def structs(self) -> tuple[Batch, Exact]:
        """The requests and the step's own tokens for the C interface; numbers are where kernels read them."""
        batch = batch_struct(self.query_starts, self.seq_lens, self.query_THD.shape[1], self.softmax_scale)
        rows = (rows_struct(self.keys_THD), rows_struct(self.values_THD))
        return batch, Exact(*rows, self.stored_lens, self.exact_rows, self.exact_starts_R)

    @property
    def most_queries(self) -> int:
        return self.query_THD.shape[0] if self.max_query_len is None else self.max_query_len

    @property
    def exact_starts_R(self) -> Tensor:
        """Where each request's exact rows begin, and the end of the last."""
        return torch.nn.functional.pad((self.seq_lens - self.stored_lens).cumsum(0, dtype=torch.int32), (1, 0))

    def runs(self, on_kernels: Callable[[int], bool]) -> list[tuple[Self, bool]]:
        """Neighbours whose numbers of queries go the same way; which way is the second of each pair. On the host."""
        queries = self.query_starts.diff().tolist()
        flags = [on_kernels(each) for each in queries]
        ends = [i + 1 for i, flag in enumerate(flags) if i + 1 == len(flags) or flags[i + 1] != flag]
        if len(ends) == 1:
            return [(replace(self, max_query_len=max(queries)), flags[0])]
        exact_R = self.exact_starts_R
        return [(self._part(start, stop, exact_R), flags[start]) for start, stop in zip([0, *ends], ends, strict=False)]

    def _part(self, start: int, stop: int, exact_R: Tensor) -> Self:
        starts_R = self.query_starts[start : stop + 1]
        return replace(
            self,
            k_tables=[table_RN[start:stop] for table_RN in self.k_tables],
            v_tables=[table_RN[start:stop] for table_RN in self.v_tables],
            query_starts=starts_R,
            seq_lens=self.seq_lens[start:stop],
            stored_lens=self.stored_lens[start:stop],
            exact_rows=self.exact_rows[exact_R[start] : exact_R[stop]],
            max_query_len=int(starts_R.diff().max()),
        )

    def alone(self) -> Self:
        """With no rows of output and queries but its own."""
        own = slice(int(self.query_starts[0]), int(self.query_starts[-1]))
        starts_R = self.query_starts - self.query_starts[0]
        return replace(self, output_THD=self.output_THD[own], query_THD=self.query_THD[own], query_starts=starts_R)
