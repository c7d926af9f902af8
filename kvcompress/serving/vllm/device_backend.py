"""The attention backend of layers that the CUDA kernels attend: pages in fragment order, numbers left on the device.

A step of few queries per request, as all decoding is, becomes the same launches whatever its lengths are, and reads
nothing from the device: vLLM may capture it in a CUDA graph and replay it with other lengths, blocks and slots in the
same tensors, padded with requests that have no queries and tokens that have no slot. A chunk of a prompt is never
captured; where it begins and ends in its request is known on the host, so it does not wait for the device either.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvcompress.codec.heads.layout import CHUNK_TOKENS, FRAGMENT
from kvcompress.codec.heads.spec import HeadsSpec
from kvcompress.ops import gpu
from kvcompress.ops.heads import cuda
from kvcompress.ops.heads.attention import order
from kvcompress.serving.vllm import compat, limits
from kvcompress.serving.vllm.backend import (
    CompressedAttentionBackend,
    CompressedAttentionImpl,
    CompressedMetadata,
    CompressedMetadataBuilder,
    Part,
)


def backend_for(layer: HeadsSpec, config: compat.VllmConfig) -> type[CompressedAttentionBackend]:
    """The backend of a layer with this codec: the one place where the order of bytes in its pages is decided.

    Raises:
        ValueError: the operator has chosen a block size that the CUDA kernels cannot read.
    """
    if order(layer, compat.device(config)) != FRAGMENT:
        return CompressedAttentionBackend
    limits.check_kernel_blocks(config)
    return DeviceAttentionBackend


class DeviceAttentionBackend(CompressedAttentionBackend):
    """Names the parts. A name of its own, because connectors compare names to tell whether engines' pages are alike.

    A form with other pages and kernels of its own inherits this beside its backend for the host, and names its
    implementation and block sizes; `Part` has what its operations need.
    """

    @staticmethod
    def get_name() -> str:
        return compat.DEVICE_BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[CompressedAttentionImpl]:
        return DeviceAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CompressedMetadataBuilder]:
        return DeviceMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | compat.MultipleOf]:
        # A power of two of chunks is needed (`limits`, and `_layout_of`). But vLLM changes the specs of backends that
        # list exact sizes, and they might no longer fit into one group with those of other backends.
        return [compat.MultipleOf(CHUNK_TOKENS)]


@dataclass
class DeviceMetadata(CompressedMetadata):
    """One step's batch, starts and lengths on the device."""

    calls: Sequence[Part] = ()
    bounds: Tensor | None = field(default=None, repr=False)

    @property
    def parts(self) -> Sequence[Part]:
        return self.calls

    @property
    def longest(self) -> Tensor | None:
        return self.bounds


class DeviceMetadataBuilder(CompressedMetadataBuilder):
    """Nothing is read from the device."""

    _cudagraph_support = compat.AttentionCGSupport.UNIFORM_BATCH

    @classmethod
    def get_cudagraph_support(cls, vllm_config: compat.VllmConfig, kv_cache_spec: Any) -> compat.AttentionCGSupport:
        """Of steps in which all requests have as many queries, if the kernels take so many."""
        if compat.most_decode_queries(vllm_config) > gpu.MOST_QUERIES:
            return compat.AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return cls._cudagraph_support

    def build_for_cudagraph_capture(self, common_attn_metadata: compat.CommonAttentionMetadata) -> CompressedMetadata:
        # Not `build`: the blocks of a made-up batch are nothing for the sentinel.
        return self.describe(common_attn_metadata)

    def describe(self, batch: compat.CommonAttentionMetadata) -> DeviceMetadata:
        assert batch.causal is True, "layers with a codec are causal decoder layers; anything else is refused at start"
        requests = batch.num_reqs
        starts, lengths = batch.query_start_loc[: requests + 1], batch.seq_lens[:requests]
        return DeviceMetadata(
            num_actual_tokens=batch.num_actual_tokens,
            slot_mapping=batch.slot_mapping,
            block_table=batch.block_table_tensor,
            query_starts=starts,
            seq_lens=lengths,
            calls=list(parts_of(batch, starts, lengths)),
            bounds=batch.seq_lens_cpu_upper_bound,
        )


def parts_of(batch: compat.CommonAttentionMetadata, starts: Tensor, lengths: Tensor) -> Iterator[Part]:
    """The calls that attend a batch: runs of requests with few queries by the kernels, the others one by one.

    Args:
        starts, lengths: of all requests, on the device.
    """
    if batch.max_query_len <= gpu.MOST_QUERIES:
        # Maybe captured: nothing here may depend on more than shapes.
        yield Part(slice(None), slice(0, batch.num_actual_tokens), starts, lengths, batch.max_query_len)
        return
    first_token = batch.query_start_loc_cpu[: batch.num_reqs + 1].tolist()
    queries = [stop - start for start, stop in itertools.pairwise(first_token)]
    # The engine's bounds are exact for requests that are fed their prompt.
    bounds = batch.seq_lens_cpu_upper_bound
    length_of = (lengths.cpu() if bounds is None else bounds).tolist()
    for long, run in itertools.groupby(range(batch.num_reqs), lambda request: queries[request] > gpu.MOST_QUERIES):
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


class DeviceAttentionImpl(CompressedAttentionImpl):
    """Attention of one layer, by the codec it is given."""

    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, batch: CompressedMetadata, output: Tensor
    ) -> None:
        if not cuda.covers_blocks(kv_cache.shape[2]):
            raise ValueError(limits.kernel_blocks(kv_cache.shape[2]))
        super()._run(query, key, value, kv_cache, batch, output)
