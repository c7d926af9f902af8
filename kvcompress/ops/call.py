"""What attention is asked: the same of every form of cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvcompress.ops.interface.common import Batch
from kvcompress.ops.rows import Numbers, batch_struct, host_list, int32_rows

SCORE_BYTES = 64 * 2**20
"""Bound on the scores (queries x tokens) that torch code holds at a time: long prompts go in chunks of queries."""


@dataclass(slots=True)
class Call:
    """Causal attention of the newest tokens of some requests over all their tokens."""

    output_THD: Tensor
    """The result, written in place `[tokens, query heads, head_dim]`."""
    query_THD: Tensor
    """Post-RoPE queries of all requests, one after the other; float32, bfloat16 or float16."""
    block_table_RN: Tensor
    """Block numbers of each request's tokens, in order; entries past its end are not read."""
    query_starts: Numbers
    """Where each request's queries begin, and the end of the last `[requests + 1]`."""
    seq_lens: Numbers
    """Tokens of each request, its queries' own included `[requests]`. On a GPU, numbers of a few queries per request
    should be the device's, numbers of more the host's: then nobody waits."""
    softmax_scale: float
    """Usually head_dim ** -0.5."""
    lse_TH: Tensor | None = None
    """If given, receives each row's log of the sum of exponentials, float32 `[tokens, query heads]`."""
    max_query_len: int | None = None
    """The most queries of a request, for a GPU: its kernels read lengths on the device, and start enough threads for
    any lengths."""

    @property
    def most_queries(self) -> int:
        """Of a request; where only the device knows, all tokens could be one request's."""
        if self.max_query_len is not None:
            return self.max_query_len
        if isinstance(self.query_starts, Tensor) and self.query_starts.device.type != "cpu":
            return self.query_THD.shape[0]
        return max((stop - start for start, stop in pairwise(host_list(self.query_starts))), default=0)

    def numbers(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Block table, starts and lengths as kernels read them, in int32 on a device."""
        numbers = (self.block_table_RN, self.query_starts, self.seq_lens)
        table_RN, starts_R, lengths_R = (int32_rows(each, device) for each in numbers)
        assert self.lse_TH is None or (self.lse_TH.dtype == torch.float32 and self.lse_TH.is_contiguous())
        return table_RN, starts_R, lengths_R

    def batch(self, device: torch.device | str = "cpu") -> Batch:
        """The same for the C interface."""
        table_RN, starts_R, lengths_R = self.numbers(device)
        return batch_struct(starts_R, lengths_R, self.query_THD.shape[1], self.softmax_scale, table_RN)

    def requests(self) -> Iterator[tuple[int, slice, int]]:
        """Those with queries: number, rows and length. Brings numbers to the host."""
        lengths: Sequence[int] = host_list(self.seq_lens)
        for request, (start, stop) in enumerate(pairwise(host_list(self.query_starts)[: len(lengths) + 1])):
            if start < stop:
                yield request, slice(start, stop), lengths[request]

    def chunks(self, rows: slice, length: int, attended: int) -> Iterator[tuple[slice, int]]:
        """A request's rows in runs whose scores have room, each with the tokens that its last one sees.

        Args:
            length: of the request.
            attended: keys that every query is scored with.
        """
        step = max(1, SCORE_BYTES // (4 * self.query_THD.shape[1] * attended))
        for first in range(rows.start, rows.stop, step):
            last = min(first + step, rows.stop)
            # Tokens after the chunk's last query are invisible to all of it.
            yield slice(first, last), length - (rows.stop - last)
