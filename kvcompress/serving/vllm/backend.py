"""The attention backend: vLLM's metadata in, compressed pages written and read.

One forward call stores the step's tokens and then attends to all tokens in their stored form, the new ones included,
so a result depends neither on how a prompt is chunked nor on prefix hits, preemption or rejected drafts.

This is the form for the CPU, and for a GPU wherever there is no kernel; `device_backend` has that of the CUDA kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvcompress.codec.heads.layout import PART_ALIGNMENT
from kvcompress.ops.heads.attention import bind
from kvcompress.serving.vllm import compat


class CompressedAttentionBackend(compat.AttentionBackend):  # type: ignore[misc]
    """Names the parts. vLLM's own selector never chooses it; a layer with a codec brings it along."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return compat.BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[CompressedAttentionImpl]:
        return CompressedAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CompressedMetadataBuilder]:
        return CompressedMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | compat.MultipleOf]:
        return [compat.MultipleOf(PART_ALIGNMENT)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[compat.KVCacheLayout, ...]:
        # A record is one run of bytes: heads outside tokens. Block-outermost comes first because vLLM needs it to
        # pack layers of different sizes when a model has more than one cache group.
        return (compat.KVCacheLayout.BLHNC, compat.KVCacheLayout.LBHNC)

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False


@dataclass(frozen=True)
class Part:
    """Neighbouring requests of a step that are attended in one call, as `ops.attention.decode_attention` wants them."""

    requests: slice
    tokens: slice
    query_starts: Tensor | Sequence[int]
    """Counted from the part's first token."""
    seq_lens: Tensor | Sequence[int]
    max_query_len: int | None = None


@dataclass
class CompressedMetadata(compat.AttentionMetadata):  # type: ignore[misc]
    """One step's batch. Starts and lengths are where the form's operations want them: here on the host, where requests
    are scheduled; in `device_backend.DeviceMetadata` on the device.
    """

    num_actual_tokens: int
    slot_mapping: Tensor
    block_table: Tensor
    query_starts: Tensor
    seq_lens: Tensor
    derived: dict[Any, Any] = field(init=False, repr=False, compare=False, default_factory=dict)
    """What layers make of it, made by the first that needs it."""

    @property
    def parts(self) -> Sequence[Part]:
        """The calls in which all requests are attended."""
        return [Part(slice(None), slice(None), self.query_starts, self.seq_lens)]

    @property
    def longest(self) -> Tensor | None:
        """Lengths on the host, or bounds of them; None where the engine has told none."""
        return self.seq_lens


class CompressedMetadataBuilder(compat.AttentionMetadataBuilder):  # type: ignore[misc]
    """Brings lengths to the host once per step, not once per layer; a step's begin is also the sentinel's turn."""

    _cudagraph_support = compat.AttentionCGSupport.NEVER

    def __init__(
        self,
        kv_cache_spec: compat.AttentionSpec,
        layer_names: list[str],
        vllm_config: compat.VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: compat.CommonAttentionMetadata, fast_build: bool = False
    ) -> CompressedMetadata:
        metadata = self.describe(common_attn_metadata)
        sentinel = compat.sentinel_of(self.vllm_config)
        if sentinel is not None:
            sentinel.step(self.layer_names, metadata)
        return metadata

    def describe(self, batch: compat.CommonAttentionMetadata) -> CompressedMetadata:
        """The step as the form's implementation wants it."""
        assert batch.causal is True, "layers with a codec are causal decoder layers; anything else is refused at start"
        return CompressedMetadata(
            num_actual_tokens=batch.num_actual_tokens,
            slot_mapping=batch.slot_mapping,
            block_table=batch.block_table_tensor,
            query_starts=batch.query_start_loc_cpu[: batch.num_reqs + 1],
            seq_lens=batch.seq_lens[: batch.num_reqs].cpu(),
        )


class CompressedAttentionImpl(compat.AttentionImpl):  # type: ignore[misc]
    """Attention of one layer, by the codec it is given."""

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
        attn_type: str = compat.AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        # `limits` has refused layers that need any of these.
        assert alibi_slopes is None
        assert sliding_window is None
        assert not logits_soft_cap
        assert attn_type == compat.AttentionType.DECODER
        assert kv_sharing_target_layer_name is None
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self._op: Any = None
        self._longest = 0

    @property
    def on_kernels(self) -> bool:
        """Whether the CUDA kernels attend."""
        return bool(self._op.on_kernels)

    def use_codec(self, codec: Any, device: torch.device, longest: int) -> None:
        """Bind the codec of this rank's KV heads to the layer's device, for requests of up to `longest` tokens."""
        assert (codec.spec.num_kv_heads, codec.spec.head_dim) == (self.num_kv_heads, self.head_size)
        self._op, self._longest = self._bind(codec, device), longest

    def _bind(self, codec: Any, device: torch.device) -> Any:
        return bind(codec, device)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CompressedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store this step's keys and values, then attend.

        Args:
            query: `[tokens, heads, head_dim]`, post-RoPE like the keys; may be padded at the end.
            key, value: `[tokens, KV heads, head_dim]`.
            kv_cache: `uint8 [blocks, KV heads, tokens per block, bytes per token]`, blocks possibly strided.
            attn_metadata: None in profiling and warm-up runs.
            output: written in place.
        """
        assert output_scale is None, "vLLM asks before it fuses output quantization"
        assert output_block_scale is None
        if attn_metadata is None:
            return self._profile(output)
        tokens = attn_metadata.num_actual_tokens
        self._run(query, key[:tokens], value[:tokens], kv_cache, attn_metadata, output)
        return output

    def _run(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, batch: CompressedMetadata, output: Tensor
    ) -> None:
        """Store and attend, for keys and values without padding. Other forms of cache override this."""
        pages_NHX = kv_cache.flatten(2)
        self._op.append(pages_NHX, key, value, batch.slot_mapping[: key.shape[0]])
        for part in batch.parts:
            self._op.attend(
                output[part.tokens],
                query[part.tokens],
                pages_NHX,
                batch.block_table[part.requests],
                part.query_starts,
                part.seq_lens,
                self.scale,
                max_query_len=part.max_query_len,
            )

    def latents(self, kv_cache: Tensor, block_1: Tensor) -> Sequence[Tensor]:
        """What one block holds: normalized latents of its keys and of its values, tokens first."""
        found: Sequence[Tensor] = self._op.read(kv_cache.flatten(2), block_1, kv_cache.shape[2])
        return found

    def _profile(self, output: Tensor) -> Tensor:
        # vLLM measures how much memory a step needs on devices of fixed memory and gives the rest to the cache;
        # without this allocation it would give away our workspace, too.
        if output.device.type != "cpu":
            torch.empty(self._workspace(output), dtype=torch.uint8, device=output.device)
        return output.fill_(0)

    def _workspace(self, output: Tensor) -> int:
        """Bytes that attention takes at most beside its arguments, in steps of no more tokens than `output` has."""
        found: int = self._op.workspace_bytes(output.shape[0], self.num_heads, self._longest, output.dtype)
        return found
