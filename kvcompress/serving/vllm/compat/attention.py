"""The base classes of a form's attention, in the shapes of vLLM's calls: backend, metadata builder, implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from kvcompress.codec.layout import PART_ALIGNMENT

_OWN_NAMES = hasattr(AttentionBackendEnum, "register")
"""From 0.32 on a plug-in's backends have names; before, all of everybody's have one."""


@dataclass(frozen=True)
class Batch:
    """A step's requests, as vLLM describes them to the builder of one cache group."""

    requests: int
    tokens: int
    """Maybe with padding at the end, as requests may be."""
    max_queries: int
    """Of a request."""
    query_starts: Tensor
    """Where each request's queries begin, and the end of the last `[requests + 1]`, on the device."""
    host_query_starts: Tensor
    seq_lens: Tensor
    """Tokens of each request, new ones included `[requests]`, on the device."""
    host_seq_lens: Tensor | None
    """Bounds of them, exact for requests that are fed their prompt; None where the engine tells none."""
    slots_T: Tensor
    block_table_RN: Tensor

    @classmethod
    def of(cls, batch: CommonAttentionMetadata) -> Batch:
        assert batch.causal is True, "layers with a codec are causal decoder layers; anything else is refused at start"
        requests = batch.num_reqs
        return cls(
            requests=requests,
            tokens=batch.num_actual_tokens,
            max_queries=batch.max_query_len,
            query_starts=batch.query_start_loc[: requests + 1],
            host_query_starts=batch.query_start_loc_cpu[: requests + 1],
            seq_lens=batch.seq_lens[:requests],
            host_seq_lens=batch.seq_lens_cpu_upper_bound,
            slots_T=batch.slot_mapping,
            block_table_RN=batch.block_table_tensor,
        )


class MetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Describes every step once for all layers of a cache group; a step's begin is also the sentinel's turn."""

    captured_queries: ClassVar[int] = 0
    """Most queries of a request in steps that may become CUDA graphs; 0: none may."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        if not cls.captured_queries:
            return AttentionCGSupport.NEVER
        # A token and its drafts, and some drafters' masks for them.
        if 1 + 2 * vllm_config.num_speculative_tokens > cls.captured_queries:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.UNIFORM_BATCH

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        step = self.describe(Batch.of(common_attn_metadata))
        sentinel = getattr(getattr(self.vllm_config, "quant_config", None), "sentinel", None)
        if sentinel is not None:
            sentinel.step(self.layer_names, step)
        return step

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        # Not `build`: the blocks of a made-up batch are nothing for the sentinel.
        return self.describe(Batch.of(common_attn_metadata))

    def describe(self, batch: Batch) -> Any:
        """The step as the form's implementation wants it."""
        raise NotImplementedError


class Implementation(AttentionImpl):  # type: ignore[misc]
    """Attention of one layer. A form says how it stores and attends, and what a page decodes to."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        # `limits` has refused layers that need any of these.
        assert alibi_slopes is None
        assert sliding_window is None
        assert kv_cache_dtype == "auto"
        assert not logits_soft_cap
        assert attn_type == AttentionType.DECODER
        assert kv_sharing_target_layer_name is None
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store this step's keys and values, then attend.

        Args:
            query: `[tokens, heads, head_dim]`, post-RoPE like the keys; may be padded at the end.
            key, value: `[tokens, KV heads, head_dim]`.
            kv_cache: `[blocks, KV heads, tokens per block, content]`, blocks possibly strided.
            attn_metadata: what the builder made; None in profiling and warm-up runs.
            output: written in place.
        """
        assert output_scale is None, "vLLM asks before it fuses output quantization"
        assert output_block_scale is None
        if attn_metadata is None:
            # vLLM measures how much memory a step needs on devices of fixed memory and gives the rest to the cache;
            # without this allocation it would give away our workspace, too.
            if output.device.type != "cpu":
                torch.empty(self.workspace_bytes(output), dtype=torch.uint8, device=output.device)
            return output.fill_(0)
        tokens = attn_metadata.num_actual_tokens
        self.run(query, key[:tokens], value[:tokens], kv_cache, attn_metadata, output)
        return output

    def run(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, step: Any, output: Tensor) -> None:
        """Store and attend, for keys and values without padding."""
        raise NotImplementedError

    def workspace_bytes(self, output: Tensor) -> int:
        """Bytes that attention takes at most beside its arguments, in steps of no more tokens than `output` has."""
        raise NotImplementedError

    def latents(self, kv_cache: Tensor, block_1: Tensor) -> Sequence[Tensor]:
        """Of every side: what one block holds as the numbers that are encoded, tokens first."""
        raise NotImplementedError


class Backend(AttentionBackend):  # type: ignore[misc]
    """Names the parts. vLLM's own selector never chooses it; a layer with a codec brings it along.

    Defining one with a `name` registers it. Connectors compare names to tell whether engines' pages are alike.
    """

    name: ClassVar[str]
    implementation: ClassVar[type[Implementation]]
    builder: ClassVar[type[MetadataBuilder]]
    block_multiple: ClassVar[int] = PART_ALIGNMENT
    """Pages hold a multiple of so many tokens. vLLM chooses the smallest where the operator chooses none."""
    beside_others: ClassVar[bool] = False
    """Whether a layer has another cache of other size beside its pages: then vLLM packs both into common blocks."""
    values_in_keys: ClassVar[bool] = False
    """Whether values are part of keys and take no room."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            return
        path = f"{cls.__module__}.{cls.__qualname__}"
        if not _OWN_NAMES:
            register_backend(AttentionBackendEnum.CUSTOM, path)
        elif cls.name not in AttentionBackendEnum.__members__:
            register_backend(cls.name, path)

    @classmethod
    def get_name(cls) -> str:
        return cls.name if _OWN_NAMES else "CUSTOM"

    @classmethod
    def get_impl_cls(cls) -> type[Implementation]:
        return cls.implementation

    @classmethod
    def get_builder_cls(cls) -> type[MetadataBuilder]:
        return cls.builder

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        # vLLM changes the specs of backends that list exact sizes, and they might no longer fit into one group with
        # those of other backends.
        return [MultipleOf(cls.block_multiple)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # A record is one run of bytes: heads outside tokens. Block-outermost comes first because vLLM needs it to
        # pack layers of different sizes when a model has more than one cache group.
        return (KVCacheLayout.BLHNC,) if cls.beside_others else (KVCacheLayout.BLHNC, KVCacheLayout.LBHNC)

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return replace(spec, head_size_v=0, max_tp_shards=1) if cls.values_in_keys else spec
