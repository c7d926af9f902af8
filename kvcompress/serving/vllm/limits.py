"""What a compressed layer cannot do yet. Everything here is checked when the model is built, before weights load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvcompress.codec.contract import CacheCodec
from kvcompress.codec.groups import check_groups, of_group
from kvcompress.codec.heads.layout import CHUNK_TOKENS, PART_ALIGNMENT
from kvcompress.codec.prompt.spec import PromptSpec
from kvcompress.codec.rope import Rope
from kvcompress.codec.shared.codec import SharedCodec
from kvcompress.codec.shared.spec import SharedSpec
from kvcompress.codec.spec import CacheSpec, CodecSpec
from kvcompress.ops import cuda_library
from kvcompress.ops.heads import cuda
from kvcompress.serving.loading import CANARY, canary_is_asked_for
from kvcompress.serving.vllm import compat


def check_engine(config: compat.VllmConfig, codec: CodecSpec) -> None:
    """Refuse engine options and models that no layer could serve.

    Raises:
        ValueError: naming the option or the difference.
    """
    layers = compat.num_decoder_layers(config)
    if layers != len(codec.layers):
        raise ValueError(
            f"the codec has {len(codec.layers)} layers and the model {layers}; config.json and the codec do not belong "
            "together; compress the model again"
        )
    if not any(codec.layers):
        return  # factored weights alone leave the cache to vLLM
    if config.model_config.use_mla:
        raise ValueError("the model uses multi-head latent attention (MLA); kvcompress does not serve such models yet")
    if config.cache_config.cache_dtype != "auto":
        raise ValueError(
            f"found --kv-cache-dtype {config.cache_config.cache_dtype}; the codec decides how the cache is stored; "
            "leave the option at auto"
        )
    if config.load_config.load_format == "dummy" and canary_is_asked_for():
        raise ValueError(
            "found --load-format dummy; the codec does not fit the keys and values of random weights, and the start-up "
            f"canary would say so; leave the option out, or to measure time alone set {CANARY}=0"
        )
    block_size = config.cache_config.block_size
    if block_size % PART_ALIGNMENT:
        raise ValueError(
            f"found --block-size {block_size}; compressed pages need a multiple of {PART_ALIGNMENT}, such as "
            f"{-(-block_size // PART_ALIGNMENT) * PART_ALIGNMENT}"
        )
    parallel = config.parallel_config
    if any(map(of_group, codec.layers)):
        _check_shared(config, codec)
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, option)
        if size > 1:
            flag = "--" + option.replace("_", "-")
            raise ValueError(f"found {flag} {size}; a compressed cache is not split over context; leave it at 1")


def _check_shared(config: compat.VllmConfig, codec: CodecSpec) -> None:
    """Refuse what layers that share a latent cannot do here."""
    check_groups(codec.layers)
    for layer in codec.layers:
        if isinstance(layer, PromptSpec):
            raise ValueError(
                "the codec finds its basis in each prompt (xkv with basis: prompt), so no two requests could share "
                "pages and a prompt would need its whole cache first; serve it through transformers, or compress "
                "the model with basis: calibrated"
            )
        if isinstance(layer, SharedSpec) and (layer.sink or layer.recent):
            raise ValueError(
                f"the codec keeps the first {layer.sink} and the newest {layer.recent} tokens as they are, which pages "
                "of one size per token cannot; serve it through transformers, or compress with sink: 0 and recent: 0"
            )
    parallel = config.parallel_config
    for option, reason in (
        ("tensor_parallel_size", "the latent that layers share is of all KV heads and is not divided over ranks"),
        ("pipeline_parallel_size", "layers that share a latent must run in one process"),
    ):
        size = getattr(parallel, option)
        if size > 1:
            raise ValueError(f"found --{option.replace('_', '-')} {size}; {reason}; use 1, or more replicas")
    if getattr(parallel, "use_ubatching", False):
        raise ValueError("found --enable-dbo; layers that share a latent run a step in one piece; leave it off")


def check_rope(config: compat.VllmConfig, codecs: Sequence[CacheCodec | None]) -> None:
    """Refuse a model whose keys are rotated otherwise than when its codec was made, as by --hf-overrides.

    Raises:
        ValueError: naming the first layer.
    """
    served: Rope | None = None
    for index, codec in enumerate(codecs):
        if isinstance(codec, SharedCodec) and codec.rope is not None:
            served = served or Rope.of(config.model_config.hf_text_config)
            if not codec.rope.same(served):
                raise ValueError(
                    f"layer {index}'s codec was made for another rotary embedding (RoPE) than the engine is asked to "
                    "use; leave rope parameters as they are in config.json, or compress the model again with them"
                )


def check_blocks(config: compat.VllmConfig, block: int, has_uncompressed_layers: bool) -> None:
    """Refuse engine options that a cache of the form `blocks` lacks.

    Args:
        block: tokens that the codec compresses at a time.

    Raises:
        ValueError: naming the option.
    """
    cache = config.cache_config
    if cache.user_specified_block_size and cache.block_size % block:
        raise ValueError(
            f"found --block-size {cache.block_size}; the codec compresses {block} tokens at a time; use a multiple of "
            f"that, such as {-(-cache.block_size // block) * block}"
        )
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ValueError(
            "found --disable-hybrid-kv-cache-manager; the codec keeps each request's newest tokens in a cache group of "
            "its own; leave the option out"
        )
    if config.kv_transfer_config is not None:
        raise ValueError(
            "found --kv-transfer-config; the newest tokens of a request, which the codec keeps uncompressed, are not "
            "transferred; leave the option out or compress with another encoding"
        )
    if has_uncompressed_layers and compat.is_cpu():
        raise ValueError(
            "the codec compresses blocks of tokens and leaves some layers uncompressed; vLLM's CPU backend cannot hold "
            "such caches side by side; serve on a GPU or compress with another encoding"
        )


def check_kernel_blocks(config: compat.VllmConfig) -> None:
    """Refuse a block size of the operator's that the CUDA kernels cannot read; vLLM itself chooses one that they can.

    Raises:
        ValueError: naming the option.
    """
    cache = config.cache_config
    if cache.user_specified_block_size and not cuda.covers_blocks(cache.block_size):
        raise ValueError(kernel_blocks(cache.block_size))


def kernel_blocks(found: int) -> str:
    """Why blocks of so many tokens are not served on CUDA kernels."""
    return (
        f"found --block-size {found}; the CUDA kernels read pages of {CHUNK_TOKENS} tokens times a power of two; use "
        f"{CHUNK_TOKENS}, or leave the option out; {cuda_library.PATH_VARIABLE}= (empty) serves with torch code instead"
    )


def check_layer(layer: Any, name: str, codec: CacheSpec, config: compat.VllmConfig) -> None:
    """Refuse an attention layer that has a codec and a feature the compressed path lacks.

    Raises:
        ValueError: naming the layer and the feature.
    """
    for unsupported, reason in _features(layer, config):
        if unsupported:
            raise ValueError(
                f"{name} has a codec but {reason}, which a compressed cache does not serve; "
                "compress the model again with this layer left out"
            )
    heads = compat.total_num_kv_heads(config)
    if (heads, layer.head_size) != (codec.num_kv_heads, codec.head_dim):
        raise ValueError(
            f"{name} has {heads} KV heads of {layer.head_size} channels; its codec was made for {codec.num_kv_heads} "
            f"of {codec.head_dim}; compress this model again"
        )


def _features(layer: Any, config: compat.VllmConfig) -> list[tuple[bool, str]]:
    # vLLM has built its own implementation of the layer by now; what it was asked to do is recorded there.
    stock = layer.impl
    return [
        (type(layer) is not compat.Attention, f"is a {type(layer).__name__} layer"),
        (
            layer.attn_type != compat.AttentionType.DECODER,
            f"does {compat.AttentionType(layer.attn_type).value} attention",
        ),
        (layer.sliding_window is not None, f"attends a sliding window of {layer.sliding_window} tokens"),
        (getattr(stock, "alibi_slopes", None) is not None or layer.use_alibi_sqrt, "uses ALiBi position biases"),
        (bool(getattr(stock, "logits_soft_cap", None)), "caps its attention logits"),
        (layer.has_sink, "has learned attention sinks"),
        (layer.use_mm_prefix, "attends image tokens in both directions"),
        (layer.kv_sharing_target_layer_name is not None, "shares another layer's cache"),
        (layer.head_size_v != layer.head_size, "has values of another size than keys"),
        (layer.kv_cache_dtype != "auto", f"stores its cache as {layer.kv_cache_dtype}"),
    ]
