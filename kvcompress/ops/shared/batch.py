"""A step's numbers where layers share a latent, and its runs of requests that are attended in the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress.ops.rows import Numbers, int32_rows


@dataclass(frozen=True)
class Batch:
    """A step, in int32 on one device."""

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

    @classmethod
    def of(
        cls, device: torch.device | str, k_tables: Sequence[Tensor], v_tables: Sequence[Tensor], *numbers: Numbers
    ) -> Batch:
        """As kernels read it, from numbers in the order above."""
        k_tables, v_tables = ([int32_rows(table_RN, device) for table_RN in tables] for tables in (k_tables, v_tables))
        starts_R, lengths_R, stored_R, rows = (int32_rows(each, device) for each in numbers)
        return cls(k_tables, v_tables, starts_R, lengths_R, stored_R, rows)

    def on(self, device: torch.device | str) -> Batch:
        numbers = (self.query_starts, self.seq_lens, self.stored_lens, self.exact_rows)
        return Batch.of(device, self.k_tables, self.v_tables, *numbers)

    @property
    def exact_starts_R(self) -> Tensor:
        """Where each request's exact rows begin, and the end of the last."""
        return torch.nn.functional.pad((self.seq_lens - self.stored_lens).cumsum(0, dtype=torch.int32), (1, 0))

    def runs(self, on_kernels: Callable[[int], bool]) -> list[tuple[Batch, bool]]:
        """Neighbours whose numbers of queries go the same way; which way is the second of each pair. On the host."""
        flags = [on_kernels(queries) for queries in self.query_starts.diff().tolist()]
        ends = [i + 1 for i, flag in enumerate(flags) if i + 1 == len(flags) or flags[i + 1] != flag]
        exact_R = self.exact_starts_R
        return [(self._part(start, stop, exact_R), flags[start]) for start, stop in zip([0, *ends], ends, strict=False)]

    def _part(self, start: int, stop: int, exact_R: Tensor) -> Batch:
        return Batch(
            [table_RN[start:stop] for table_RN in self.k_tables],
            [table_RN[start:stop] for table_RN in self.v_tables],
            self.query_starts[start : stop + 1],
            self.seq_lens[start:stop],
            self.stored_lens[start:stop],
            self.exact_rows[exact_R[start] : exact_R[stop]],
        )
