"""A step as the implementations of all forms want it, once per step and not once per layer.

Where requests are scheduled, on the host, and where they are attended, on the device, are two places, and a form says
by its builder where it wants starts and lengths. On the device, nothing is read from it: a step of few queries per
request, as all decoding is, becomes the same launches whatever its lengths are, and vLLM may capture it in a CUDA graph
and replay it with other lengths, blocks and slots in the same tensors, padded with requests that have no queries and
tokens that have no slot. A chunk of a prompt is never captured; where it begins and ends in its request is known on the
host, so it does not wait for the device either.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvcompress.ops import gpu
from kvcompress.ops.call import Call
from kvcompress.serving.vllm import compat


@dataclass(frozen=True)
class Part:
    """Neighbouring requests of a step that are attended in one call."""

    requests: slice
    tokens: slice
    query_starts: Tensor | Sequence[int]
    """Counted from the part's first token."""
    seq_lens: Tensor | Sequence[int]
    max_query_len: int | None = None

    def call(self, step: Step, query: Tensor, output: Tensor, scale: float) -> Call:
        """As operations take it; query and output are of the whole step."""
        return Call(
            output[self.tokens],
            query[self.tokens],
            step.block_table[self.requests],
            self.query_starts,
            self.seq_lens,
            scale,
            max_query_len=self.max_query_len,
        )


@dataclass
class Step:
    """One step of one cache group."""

    num_actual_tokens: int
    slot_mapping: Tensor
    block_table: Tensor
    query_starts: Tensor
    seq_lens: Tensor
    calls: Sequence[Part] | None = None
    longest: Tensor | None = field(default=None, repr=False)
    """Lengths on the host, or bounds of them; None where the engine has told none."""
    derived: dict[Any, Any] = field(init=False, repr=False, compare=False, default_factory=dict)
    """What layers make of it, made by the first that needs it."""

    @property
    def parts(self) -> Sequence[Part]:
        """The calls in which all requests are attended."""
        if self.calls is None:
            return [Part(slice(None), slice(None), self.query_starts, self.seq_lens)]
        return self.calls


class HostBuilder(compat.MetadataBuilder):
    """Brings lengths to the host."""

    def describe(self, batch: compat.Batch) -> Step:
        lengths = batch.seq_lens.cpu()
        return Step(
            batch.tokens, batch.slots_T, batch.block_table_RN, batch.host_query_starts, lengths, longest=lengths
        )


class DeviceBuilder(compat.MetadataBuilder):
    """Reads nothing from the device."""

    captured_queries = gpu.MOST_QUERIES

    def describe(self, batch: compat.Batch) -> Step:
        return Step(
            batch.tokens,
            batch.slots_T,
            batch.block_table_RN,
            batch.query_starts,
            batch.seq_lens,
            list(parts_of(batch)),
            batch.host_seq_lens,
        )


def parts_of(batch: compat.Batch) -> Iterator[Part]:
    """The calls that attend a batch: runs of requests with few queries by the kernels, the others one by one."""
    starts, lengths = batch.query_starts, batch.seq_lens
    if batch.max_queries <= gpu.MOST_QUERIES:
        # Maybe captured: nothing here may depend on more than shapes.
        yield Part(slice(None), slice(0, batch.tokens), starts, lengths, batch.max_queries)
        return
    first_token = batch.host_query_starts.tolist()
    queries = [stop - start for start, stop in itertools.pairwise(first_token)]
    length_of = (lengths.cpu() if batch.host_seq_lens is None else batch.host_seq_lens).tolist()
    for long, run in itertools.groupby(range(batch.requests), lambda request: queries[request] > gpu.MOST_QUERIES):
        members = list(run)
        if long:
            for request in members:
                tokens = slice(first_token[request], first_token[request + 1])
                counted = ([0, queries[request]], [length_of[request]], queries[request])
                yield Part(slice(request, request + 1), tokens, *counted)
            continue
        requests = slice(members[0], members[-1] + 1)
        tokens = slice(first_token[requests.start], first_token[requests.stop])
        if tokens.start < tokens.stop:
            counted_R = starts[requests.start : requests.stop + 1] - tokens.start
            yield Part(requests, tokens, counted_R, lengths[requests], max(queries[request] for request in members))
